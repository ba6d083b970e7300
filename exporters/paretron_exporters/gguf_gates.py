"""Is a GGUF file the model it was made from? Its tensors are put back and run."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from paretron.artifacts.models import save_model
from paretron.artifacts.reader import Checkpoint
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
    from_gguf_rows,
    gguf_names,
    read_gguf,
    rope_factors,
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
    names = gguf_names(checkpoint)
    expected = {names[n]: e.shape for n, e in checkpoint.entries.items()}
    size = sizes(checkpoint.family, checkpoint.config)
    factors = rope_factors(checkpoint.config, size)
    if factors is not None:
        expected[ROPE_FREQS] = factors.shape
    found = {n: t.shape for n, t in tensors.items()}
    what = (f"source {checkpoint.dtype}", f"GGUF {kind}")
    l0 = check_names(expected, found)
    require(ParityReport(*what, (l0,)))

    restored = {
        name: from_gguf_rows(name, tensors[target].values(), checkpoint)
        for name, target in names.items()
    }
    l1 = check_weights(_relative(checkpoint, restored), bound=_RELATIVE[kind], about="weights")
    require(ParityReport(*what, (l0, l1)))

    with tempfile.TemporaryDirectory(prefix="paretron-") as folder:
        save_model(restored, Path(folder), config=checkpoint.config, companions=checkpoint.path)
        prompts = seeded_prompts(checkpoint.config)
        reference = observe_transformers(checkpoint.path, prompts)
        candidate = observe_transformers(Path(folder), prompts)
    bounds = _Q8_0 if kind == "Q8_0" else BOUNDS[_DTYPES[kind]]
    report = ParityReport(*what, (l0, l1, *compare(reference, candidate, bounds=bounds)))
    require(report)
    return report


def _relative(
    checkpoint: Checkpoint, restored: dict[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    for name, found in restored.items():
        expected = checkpoint.read(name).float()
        largest = float(expected.abs().max()) or 1.0
        yield name, expected / largest, found / largest
