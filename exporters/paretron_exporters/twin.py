"""A few layers of a checkpoint as a small model, to run what is too large to run as a whole.

Every weight was compared before; what is left to prove is that a config makes the same computation
of them, and for that the first and last layer and one of each kind do, with the first rows of the
vocabulary and the first neurons of each MLP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

import psutil

from paretron.artifacts.headers import DTYPE_BYTES
from paretron.artifacts.reader import Checkpoint
from paretron.families import Family, Tensor, placed_tensors, sizes
from paretron.families.kinds import layer_kinds
from paretron.families.table import with_sizes

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# In float32, as it is run: above either, running takes longer than the rest of an export.
WHOLE_BYTES = 4_000_000_000
_SHARE = 0.25  # of the memory that is free
TWIN_PROMPTS = 2  # the longest of those that a whole model is given
_CUT = {"vocab": 512, "ffn": 256, "moe_ffn": 64}


@dataclass(frozen=True)
class Twin:
    """Which layers of a model are run, and how much of the axes that are cut."""

    layers: tuple[int, ...]
    sizes: Mapping[str, int]

    @property
    def about(self) -> str:
        """What was run, in a few words."""
        layers = ", ".join(str(layer + 1) for layer in self.layers)
        axes = " and ".join(f"{self.sizes[axis]} of {axis}" for axis in _CUT if axis in self.sizes)
        return f"layers {layers} with the first {axes}"


def fits(checkpoint: Checkpoint) -> bool:
    """Whether a model is small enough to be run as a whole, in float32 on this machine."""
    elements = sum(e.nbytes // DTYPE_BYTES[e.dtype] for e in checkpoint.entries.values())
    free = psutil.virtual_memory().available
    return elements * 4 <= min(WHOLE_BYTES, free * _SHARE)


def twin_of(checkpoint: Checkpoint) -> Twin:
    """The layers and sizes that stand for a model."""
    size = sizes(checkpoint.family, checkpoint.config)
    kinds = layer_kinds(checkpoint.family, checkpoint.config)
    layers = {0, size["layers"] - 1, *map(kinds.index, kinds)}
    cut = {axis: min(size[axis], most) for axis, most in _CUT.items() if axis in size}
    return Twin(tuple(sorted(layers)), size | cut | {"layers": len(layers)})


def twin_model(checkpoint: Checkpoint, twin: Twin) -> PreTrainedModel:
    """The twin as transformers makes it from the checkpoint's config, in float32 on the CPU.

    Errors: INPUT_CONFIG, GATE_RELOAD when names and modules do not fit.
    """
    import torch

    from paretron.artifacts.held import held_parameters
    from paretron.artifacts.partial import empty_model, fill

    family = checkpoint.family
    config = twin_config(family, checkpoint.config, twin)
    small = replace(checkpoint, config=config)
    rows = {p.name: (p.row, p.layer, p.expert) for p in placed_tensors(family, config)}
    whole = sizes(family, checkpoint.config)

    def read(name: str) -> torch.Tensor:
        row, layer, expert = rows[name]
        number = None if layer is None else twin.layers[layer]
        tensor = checkpoint.map(row.name.format(i=number, e=expert))
        return leading(tensor, row, sizes=whole, cut=twin.sizes).to(torch.float32, copy=True)

    model = empty_model(small, dtype=torch.float32)
    state = {held.name: held.from_disk(read) for held in held_parameters(family, config)}
    if config.get("tie_word_embeddings"):
        head = model.get_output_embeddings()
        names = {module: f"{name}.weight" for name, module in model.named_modules()}
        state[names[head]] = state[names[model.get_input_embeddings()]]
    fill(model, state, where=str(checkpoint.path))
    return model


def twin_config(family: Family, config: Mapping[str, Any], twin: Twin) -> dict[str, Any]:
    """The config of the twin; its special tokens are ones that its vocabulary has."""
    out = with_sizes(family, config, twin.sizes, kept_layers=twin.layers)
    return out | {key: 0 for key in out if key.endswith("_token_id") and out[key] is not None}


def leading(
    tensor: torch.Tensor, row: Tensor, *, sizes: Mapping[str, int], cut: Mapping[str, int]
) -> torch.Tensor:
    """What is left of a tensor when every axis is cut to its first units."""
    import torch

    for d, dim in enumerate(row.dims):
        parts, start = [], 0
        for segment in dim:
            units = [int(axis) if axis.isdigit() else sizes[axis] for axis in segment]
            kept = [int(axis) if axis.isdigit() else cut[axis] for axis in segment]
            index = torch.arange(prod(units)).view(units)
            parts.append(index[tuple(map(slice, kept))].flatten() + start)
            start += prod(units)
        index = torch.cat(parts)
        if len(index) < start:
            tensor = tensor.index_select(d, index)
    return tensor
