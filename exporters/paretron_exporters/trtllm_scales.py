"""Scales of an FP8 checkpoint: of weights from the weights, of inputs from running a text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from paretron.artifacts.models import load_model
from paretron.artifacts.reader import Checkpoint
from paretron.artifacts.rows import row_blocks
from paretron.data.store import TokenStore, sample_windows
from paretron.data.texts import Texts
from paretron_exporters.exporter import OnEvent
from paretron_exporters.trtllm_layout import Target

LARGEST = 448.0  # of float8_e4m3fn
Shared = tuple[str, ...]  # the matrices that share their scales


@dataclass(frozen=True)
class Scales:
    """What one FP8 step stands for, by the matrices that share it: largest value / 448."""

    weights: Mapping[Shared, float]
    inputs: Mapping[Shared, float]


def find_scales(
    checkpoint: Checkpoint, targets: Iterable[Target], texts: Texts, *, on_event: OnEvent
) -> Scales:
    """The scales of every quantised matrix; the model is in memory while the text runs."""
    groups = list(dict.fromkeys(t.scaled for t in targets if t.scaled))
    on_event("note", {"message": "running the calibration text for the scales of FP8"})
    inputs = largest_inputs(checkpoint, [name for g in groups for name in g], texts, on_event)
    weights = {}
    for group in groups:
        entries = (checkpoint.entries[name] for name in group)
        blocks = (block for entry in entries for _, block in row_blocks(entry))
        weights[group] = _scale(max(float(block.abs().max()) for block in blocks))
    return Scales(weights, {g: _scale(max(inputs[name] for name in g)) for g in groups})


def largest_inputs(
    checkpoint: Checkpoint, names: Iterable[str], texts: Texts, on_event: OnEvent
) -> dict[str, float]:
    """The largest absolute input of each linear, by the name of its weight, over the text."""
    model = load_model(checkpoint.path, dtype=running_dtype(checkpoint))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    largest = {name: torch.zeros((), device=device) for name in names}

    def watch(name: str, linear: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def see(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            largest[name] = torch.maximum(largest[name], arguments[0].abs().max().float())

        return linear.register_forward_pre_hook(see)

    handles = [watch(n, model.get_submodule(n.removesuffix(".weight"))) for n in largest]
    store = TokenStore.open(texts.calibration)
    windows = sample_windows(store, texts.samples, texts.calibration_seq_len, texts.seed)
    with torch.inference_mode():
        for done, window in enumerate(windows, start=1):
            model.get_decoder()(window[None].to(device), use_cache=False)
            on_event("progress", {"done": done, "total": len(windows), "unit": "samples"})
    for handle in handles:
        handle.remove()
    return {name: float(value) for name, value in largest.items()}


def running_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """In what the rest of an FP8 model runs: the source's own 16 bits, or bfloat16."""
    return torch.float16 if checkpoint.dtype == "F16" else torch.bfloat16


def to_fp8(values: torch.Tensor, scale: float) -> torch.Tensor:
    """The nearest multiples of `scale` that float8_e4m3fn holds."""
    return (values.float() / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def _scale(largest: float) -> float:
    """As float32 holds it, since that is what dequantises; 1 where every value is zero."""
    return float(torch.tensor(largest / LARGEST, dtype=torch.float32)) if largest else 1.0
