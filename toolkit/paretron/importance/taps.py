"""Where a family's activations are observed: derived from its table, never named by hand.

Heads and MLP neurons are seen at the input of the matrix that mixes them away (its second
dimension holds the axis), embedding channels at the output of every norm (METHOD of paper 1,
section 2.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from paretron.errors import Code, ParetronError, Problem
from paretron.families import Family, Sizes, Tensor, sizes

# Scored axis -> the table's axis by which its matrix is found. A head is one (kv_heads, q_per_kv).
_READ_AXES = {"heads": "q_per_kv", "ffn": "ffn"}


@dataclass(frozen=True)
class Tap:
    """One place to observe `units` units of an axis; `channels` is the width of one unit.

    A unit wider than one channel (a head) counts with its L2 norm.
    """

    axis: str
    module: str
    side: Literal["input", "output"]
    units: int
    channels: int

    def unit_values(self, activation: torch.Tensor) -> torch.Tensor:
        """One value a unit whose size is its score, [..., units] from [..., units * channels]."""
        if self.channels == 1:
            return activation
        split = activation.unflatten(-1, (self.units, self.channels))
        return torch.linalg.vector_norm(split, dim=-1, dtype=_norm_dtype(activation))


def find_taps(family: Family, config: Mapping[str, Any]) -> tuple[Tap, ...]:
    """Every tap of a model, axis by axis and in layer order; `hidden` ends with the final norm."""
    size = sizes(family, config)
    rows = [t for t in family.tensors if t.present(config)]
    taps: list[Tap] = []
    for axis, read_axis in _READ_AXES.items():
        readers = [t for t in family.readers(read_axis) if t in rows]
        taps += [_input_tap(axis, t, i, size) for i in range(size["layers"]) for t in readers]
    norms = [t for t in rows if t.is_norm]
    for i in range(size["layers"]):
        taps += [_norm_tap(t, size, i) for t in norms if t.per_layer]
    taps += [_norm_tap(t, size, None) for t in norms if not t.per_layer]
    return tuple(taps)


@contextmanager
def tapped(
    model: nn.Module, taps: tuple[Tap, ...], observe: Callable[[int, torch.Tensor], None]
) -> Iterator[None]:
    """While open, call `observe(number of the tap, activation)` on every forward pass.

    Errors: INPUT_FAMILY when a tap names no module of the model, or when one never fired.
    """
    modules = [_module(model, tap) for tap in taps]
    fired = [False] * len(taps)

    def note(number: int, activation: torch.Tensor) -> None:
        fired[number] = True
        observe(number, activation)

    handles = []
    for k, (tap, module) in enumerate(zip(taps, modules, strict=True)):
        if tap.side == "input":
            handles.append(module.register_forward_pre_hook(lambda _m, args, k=k: note(k, args[0])))
        else:
            handles.append(module.register_forward_hook(lambda _m, _args, out, k=k: note(k, out)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    silent = [tap for tap, seen in zip(taps, fired, strict=True) if not seen]
    if silent:
        raise _no_match(silent[0], "was never run")


def _norm_dtype(activation: torch.Tensor) -> torch.dtype:
    return torch.float64 if activation.dtype == torch.float64 else torch.float32


def _input_tap(axis: str, row: Tensor, layer: int, size: Sizes) -> Tap:
    (segment,) = row.dims[1]
    channels = size["head_dim"] if "head_dim" in segment else 1
    units = row.shape(size)[1] // channels
    return Tap(axis, _module_name(row, layer), "input", units, channels)


def _norm_tap(row: Tensor, size: Sizes, layer: int | None) -> Tap:
    return Tap("hidden", _module_name(row, layer), "output", size["hidden"], 1)


def _module_name(row: Tensor, layer: int | None) -> str:
    return row.name.format(i=layer).removesuffix(".weight")


def _module(model: nn.Module, tap: Tap) -> nn.Module:
    try:
        return model.get_submodule(tap.module)
    except AttributeError as error:
        raise _no_match(tap, "is no module of this model") from error


def _no_match(tap: Tap, what: str) -> ParetronError:
    return ParetronError(
        Problem(
            Code.INPUT_FAMILY,
            f"the tap of axis {tap.axis} {what}, so there is nothing to score",
            where=tap.module,
            fix="make the family table's names and the model's modules agree",
        )
    )
