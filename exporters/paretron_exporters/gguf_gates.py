"""Is a GGUF file the model it was made from? Its tensors are put back and run."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from paretron.artifacts.companions import write_companions
from paretron.artifacts.reader import Checkpoint
from paretron.artifacts.writer import TensorWriter
from paretron.evaluate.parity import (
    BOUNDS,
    Bounds,
    ParityReport,
    check_names,
    check_weights,
    compare,
    require,
    seeded_prompts,
)
from paretron.families import sizes
from paretron_exporters.gguf_file import (
    ROPE_FREQS,
    Stored,
    from_gguf,
    gguf_tensors,
    norm_offset,
    read_gguf,
    rope_factors,
    stored_shape,
)
from paretron_exporters.transformers_engine import observe_transformers

# The largest difference from the source, relative to the largest weight of the tensor: F16 and
# BF16 keep 11 and 8 bits, Q8_0 rounds to 1/127 of the largest of 32 weights, its scale to F16.
_RELATIVE = {"F32": 0.0, "F16": 2.0**-11, "BF16": 2.0**-8, "Q8_0": 0.5 / 127 + 2.0**-11}
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_Q8_0 = Bounds(kl=1e-2)


def prove(checkpoint: Checkpoint, path: Path, *, kind: str) -> ParityReport:
    """Levels L0 to L4: the file's tensors, put back into a checkpoint, against the source."""
    tensors = read_gguf(path)
    targets = gguf_tensors(checkpoint)
    expected = {t: stored_shape(checkpoint, names) for t, names in targets.items()}
    size = sizes(checkpoint.family, checkpoint.config)
    factors = rope_factors(checkpoint.config, size)
    if factors is not None:
        expected[ROPE_FREQS] = factors.shape
    found = {n: t.shape for n, t in tensors.items()}
    what = (f"source {checkpoint.dtype}", f"GGUF {kind}")
    l0 = check_names(expected, found)
    require(ParityReport(*what, (l0,)))

    stored = {
        name: part for t in targets for name, part in _parts(checkpoint, tensors[t], targets[t])
    }
    l1 = check_weights(_relative(checkpoint, stored), bound=_RELATIVE[kind], about="weights")
    require(ParityReport(*what, (l0, l1)))

    with tempfile.TemporaryDirectory(prefix=".restored-", dir=path.parent) as folder:
        layout = {n: ("F32", tuple(t.shape)) for n, t in stored.items()}
        with TensorWriter(Path(folder), layout) as writer:
            for name in layout:  # none is kept: the model is loaded next
                tensor = stored.pop(name) - norm_offset(name, checkpoint)
                writer.write(name, tensor.contiguous())
        write_companions(Path(folder), config=checkpoint.config, source=checkpoint.path)
        prompts = seeded_prompts(checkpoint.config)
        reference = observe_transformers(checkpoint.path, prompts)
        candidate = observe_transformers(Path(folder), prompts)
    bounds = _Q8_0 if kind == "Q8_0" else BOUNDS[_DTYPES[kind]]
    report = ParityReport(*what, (l0, l1, *compare(reference, candidate, bounds=bounds)))
    require(report)
    return report


def _parts(
    checkpoint: Checkpoint, tensor: Stored, names: Sequence[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors on disk that one of the file stands for."""
    values = tensor.values()
    for name, part in zip(names, values if len(names) > 1 else [values], strict=True):
        yield name, from_gguf(name, part, checkpoint)


def _relative(
    checkpoint: Checkpoint, stored: dict[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    for name, found in stored.items():
        expected = checkpoint.read(name).float() + norm_offset(name, checkpoint)
        largest = float(expected.abs().max()) or 1.0
        yield name, expected / largest, found / largest
