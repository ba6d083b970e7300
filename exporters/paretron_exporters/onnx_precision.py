"""In which precisions the ONNX model builder is used, and what can be known of each without a GPU.

Found by trying: the builder also makes a float32 graph for CUDA, whose outputs are not connected,
and float16 and bfloat16 graphs for the CPU, which ONNX Runtime cannot run. They are not offered.
"""

from __future__ import annotations

from dataclasses import dataclass

from paretron.errors import Code, Problem
from paretron.evaluate.parity import BOUNDS, Bounds
from paretron.recipe import Export

BLOCK = 32  # weights of one row that share a scale
ACCURACY_LEVEL = 4  # of CPU kernels: they round what they multiply to 8 bits, block by block


@dataclass(frozen=True)
class Precision:
    """One form of a graph: matrices in `bits`, everything else in `dtype`, both on `device`.

    `bounds` hold against the source, `own` for the engine against the weights that it was given
    and against itself. `runs_here`: whether the CPU has kernels for it.
    """

    name: str
    builder: str
    device: str
    dtype: str
    bounds: Bounds
    own: Bounds
    bits: int | None = None
    runs_here: bool = True

    @property
    def about(self) -> str:
        """How weights are kept, for a card."""
        if self.bits is None:
            return self.dtype
        return (
            f"matrices in int{self.bits}, symmetric, with a {self.dtype} scale for every {BLOCK} "
            f"weights; embeddings and norms in {self.dtype}"
        )

    @property
    def options(self) -> tuple[str, ...]:
        """What the builder is asked for; its defaults change with its version."""
        # Norms of queries and keys inside the attention kernel are for GPUs only, so such a graph
        # could not be run here before it is published.
        options = ("fuse_qk_norm_gqa=false",)
        if self.bits is None:
            return options
        level = (f"accuracy_level={ACCURACY_LEVEL}",) if self.device == "cpu" else ()
        # A tied embedding would be rounded with the output head in 4 bits, and not in 8.
        shared = "shared_embeddings=false"
        return (*options, *level, f"block_size={BLOCK}", "is_symmetric=true", shared)


_FLOAT32, _FLOAT16, _BFLOAT16 = (BOUNDS[d] for d in ("float32", "float16", "bfloat16"))
_INT8 = Bounds(kl=1e-2)
# Nothing is promised of int4 against its source; the engine must do what its weights say.
_INT4 = Bounds()
_KERNELS = Bounds(kl=1e-2)

PRECISIONS = (
    Precision("float32", "fp32", "cpu", "float32", _FLOAT32, _FLOAT32),
    Precision("int8", "int8", "cpu", "float32", _INT8, _KERNELS, bits=8),
    Precision("int4", "int4", "cpu", "float32", _INT4, _KERNELS, bits=4),
    Precision("float16", "fp16", "cuda", "float16", _FLOAT16, _FLOAT16),
    Precision("bfloat16", "bf16", "cuda", "bfloat16", _BFLOAT16, _BFLOAT16, runs_here=False),
    Precision("int8", "int8", "cuda", "float16", _INT8, _KERNELS, bits=8),
    Precision("int4", "int4", "cuda", "float16", _INT4, _KERNELS, bits=4),
)
_DEFAULT = {"cpu": "float32", "cuda": "float16"}


def precision_of(export: Export) -> Precision:
    """The precision that an export without `precision_problems` asks for."""
    device, name = _asked(export)
    return next(p for p in PRECISIONS if (p.device, p.name) == (device, name))


def precision_problems(export: Export) -> list[Problem]:
    """UNSUPPORTED for a precision that is not offered on the device."""
    device, name = _asked(export)
    if any((p.device, p.name) == (device, name) for p in PRECISIONS):
        return []
    cause = f"onnx cannot export {name} for {device}"
    return [Problem(Code.UNSUPPORTED, cause, fix=f"supported: {offered()}")]


def offered() -> str:
    """All precisions by device, in words."""
    return "; ".join(
        f"{', '.join(p.name for p in PRECISIONS if p.device == device)} on {device}"
        for device in _DEFAULT
    )


def _asked(export: Export) -> tuple[str, str]:
    device = export.device or "cpu"
    return device, export.quantize or export.dtype or _DEFAULT[device]
