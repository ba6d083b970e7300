"""Where a family's activations are observed: derived from its table, never named by hand.

Heads and MLP neurons are seen at the input of the matrix that mixes them away (its second
dimension holds the axis), embedding channels at the output of every norm (METHOD of paper 1,
section 2.2). Experts are seen while they run: `importance.experts`.
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
from paretron.importance.experts import Routed, watched

# Scored axis -> the table's axis by which its matrix is found. A head is one (kv_heads, q_per_kv).
_READ_AXES = {"heads": "q_per_kv", "ffn": "ffn"}


@dataclass(frozen=True)
class Tap:
    """One place to observe `units` units of an axis; `channels` is the width of one unit.

    A unit wider than one channel (a head) counts with its L2 norm. On the side "experts" of a
    module of experts stand what each of them adds (axis "experts", a unit an expert), and the
    neurons of `expert` (axis "moe_ffn").
    """

    axis: str
    module: str
    side: Literal["input", "output", "experts"]
    units: int
    channels: int
    expert: int | None = None

    @property
    def name(self) -> str:
        """What the scores call it: the module, with the number of the expert."""
        return self.module if self.expert is None else f"{self.module}.{self.expert}"

    def unit_values(self, activation: torch.Tensor) -> torch.Tensor:
        """One value a unit whose size is its score, [..., units] from [..., units * channels]."""
        if self.channels == 1:
            return activation
        split = activation.unflatten(-1, (self.units, self.channels))
        return torch.linalg.vector_norm(split, dim=-1, dtype=_norm_dtype(activation))


def find_taps(family: Family, config: Mapping[str, Any]) -> tuple[Tap, ...]:
    """Every tap of a model, axis by axis and in layer order; `hidden` ends with the final norm."""
    size = sizes(family, config)
    layers = [(i, family.rows(config, i)) for i in range(size["layers"])]
    taps: list[Tap] = []
    for axis, read_axis in _READ_AXES.items():
        readers = family.readers(read_axis)
        taps += [_input_tap(axis, t, i, size) for i, rows in layers for t in readers if t in rows]
    modules = [_experts_module(family, i) for i, rows in layers if any(t.per_expert for t in rows)]
    taps += [Tap("experts", m, "experts", size["experts"], 1) for m in modules]
    for m in modules:
        each = range(size["experts"])
        taps += [Tap("moe_ffn", m, "experts", size["moe_ffn"], 1, expert=e) for e in each]
    for place, rows in (*layers, (None, family.rows(config, None))):
        taps += [_norm_tap(t, size, place) for t in rows if t.is_norm]
    return tuple(taps)


@contextmanager
def tapped(
    model: nn.Module,
    taps: tuple[Tap, ...],
    observe: Callable[[int, torch.Tensor, torch.Tensor | None], None],
) -> Iterator[None]:
    """While open, call `observe(number of the tap, activation, here)` on every forward pass.

    `here` is None where the activation is [B, T, units * channels]. Else it is [rows, units], and
    `here` [B * T] is true for the tokens that have a row, in their order; the others are zero.
    Errors: INPUT_FAMILY when a tap names no module of the model, or when one never fired.
    """
    modules = [_module(model, tap) for tap in taps]
    fired = [False] * len(taps)
    # Taps of experts by module: that of the layer's experts under None, those of neurons by expert.
    routed: dict[nn.Module, dict[int | None, int]] = {}

    def note(number: int, activation: torch.Tensor, here: torch.Tensor | None = None) -> None:
        fired[number] = True
        observe(number, activation, here)

    def note_routed(module: nn.Module, seen: Routed) -> None:
        for expert, number in routed[module].items():
            if expert is None:
                everywhere = torch.ones_like(seen.routed_EN[0])
                note(number, seen.added_NE, everywhere)
            else:
                note(number, seen.neurons[expert], seen.routed_EN[expert])

    handles = []
    for k, (tap, module) in enumerate(zip(taps, modules, strict=True)):
        if tap.side == "experts":
            routed.setdefault(module, {})[tap.expert] = k
        elif tap.side == "input":
            handles.append(module.register_forward_pre_hook(lambda _m, args, k=k: note(k, args[0])))
        else:
            handles.append(module.register_forward_hook(lambda _m, _args, out, k=k: note(k, out)))
    try:
        with watched(routed, note_routed):
            yield
    finally:
        for handle in handles:
            handle.remove()
    silent = [tap for tap, seen in zip(taps, fired, strict=True) if not seen]
    if silent:
        raise _no_match(silent[0], "was never run")


def _norm_dtype(activation: torch.Tensor) -> torch.dtype:
    return torch.float64 if activation.dtype == torch.float64 else torch.float32


def _experts_module(family: Family, layer: int) -> str:
    """The module that holds all experts of a layer, by the table's word on what it is made of."""
    name = next(n for n, rows in family.held.items() if "{e}" in rows[0])
    return name.format(i=layer).rpartition(".")[0]


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
