"""Teacher and student as layers that come and go: one of each is in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from paretron.artifacts.held import in_memory
from paretron.artifacts.partial import empty_model, fill
from paretron.artifacts.reader import Checkpoint
from paretron.compensate.residual import Half
from paretron.families import Tensor, family_of
from paretron.importance.executor import LayerStack, Prepared

_NOWHERE = Path("student")  # named in errors about its config
_TOKENS_AT_ONCE = 512  # through an MLP


class StudentStack(LayerStack):
    """A model that is made while it runs: its tensors are put into it layer by layer."""

    def __init__(self, config: Mapping[str, Any], *, device: torch.device) -> None:
        family = family_of(config)
        shape = Checkpoint(path=_NOWHERE, config=dict(config), family=family, entries={})
        super().__init__(empty_model(shape, dtype=torch.float32), family)
        self._config = config
        self._device = device
        for name, buffer in self.model.named_buffers():
            owner, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(owner), leaf, buffer.to(device))

    @property
    def device(self) -> torch.device:
        """Where weights go when they are put."""
        return self._device

    @contextmanager
    def holding(self, number: int, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """While open, layer `number` has these tensors, named as on disk, and no other."""
        held = in_memory(tensors, self.family, self._config)
        prefix = f"{self._layers_name}.{number}."
        state = dict(self.layers[number].state_dict())  # what is not given stays empty
        state |= {n.removeprefix(prefix): t.to(self._device) for n, t in held.items()}
        empty = fill(self.layers[number], state, where=prefix)
        try:
            yield
        finally:
            fill(self.layers[number], empty, where=prefix)

    def put_final_norm(self, tensors: dict[str, torch.Tensor]) -> None:
        """Give the last norm its weight, and its bias where it has one."""
        fill(self._norm, {n: t.to(self._device) for n, t in tensors.items()}, where=self._norm_name)


class _Reached(Exception):
    """The module that a pass was run for has been reached."""


class _Nothing(nn.Module):
    """Stands where attention stands, and adds nothing to the stream."""

    def forward(self, hidden_states: torch.Tensor, **_: object) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None


@dataclass(frozen=True)
class Piece:
    """Some positions of a batch that have passed half a layer: `where` in [B * T], `out` [n, D].

    `inputs` are what the modules asked for have read, [n, A].
    """

    where: slice
    out: torch.Tensor
    inputs: tuple[torch.Tensor, ...]


def module_of(stack: LayerStack, row: Tensor, number: int) -> nn.Module:
    """The module of a row's weight in a layer."""
    name: str = row.name.format(i=number).removesuffix(".weight")
    return stack.model.get_submodule(name)


def experts_of(stack: LayerStack, number: int) -> nn.Module:
    """The module that holds all experts of a layer, by the table's word on what it is made of."""
    held = next(name for name, rows in stack.family.held.items() if "{e}" in rows[0])
    name: str = held.format(i=number).rpartition(".")[0]
    return stack.model.get_submodule(name)


@torch.no_grad()
def run_half(
    stack: LayerStack,
    number: int,
    half: int,
    rows: tuple[Half, Half],
    prepared: Prepared,
    hidden_BTD: torch.Tensor,
    *,
    inputs_of: tuple[nn.Module, ...] = (),
) -> Iterator[Piece]:
    """Attention's half of a layer (0) for a whole batch, or the MLP's (1), piece by piece.

    Only attention looks at other positions; an MLP over all of them at once would hold several
    times what the stream does.
    """
    if half == 0:
        second = module_of(stack, rows[1].norm, number)
        out, inputs = _run(stack, number, prepared, hidden_BTD, inputs_of, until=second)
        yield Piece(slice(None), out.flatten(0, 1), tuple(x.flatten(0, -2) for x in inputs))
        return
    flat = hidden_BTD.flatten(0, 1)
    with _without_attention(stack, number, rows[0]):
        for start in range(0, len(flat), _TOKENS_AT_ONCE):
            where = slice(start, start + _TOKENS_AT_ONCE)
            out, inputs = _run(stack, number, prepared, flat[None, where], inputs_of)
            yield Piece(where, out[0], tuple(x.flatten(0, -2) for x in inputs))


def pass_half(
    stack: LayerStack,
    number: int,
    half: int,
    rows: tuple[Half, Half],
    prepared: Prepared,
    hidden_BTD: torch.Tensor,
) -> torch.Tensor:
    """The stream behind half a layer, [B, T, D]."""
    pieces = run_half(stack, number, half, rows, prepared, hidden_BTD)
    return torch.cat([piece.out for piece in pieces]).view_as(hidden_BTD)


@contextmanager
def _without_attention(stack: LayerStack, number: int, rows: Half) -> Iterator[None]:
    """While open, the layer's first half passes the stream on as it is, without its weights."""
    norm = rows.norm.name.format(i=number).removesuffix(".weight")
    attention = rows.writers[0].name.format(i=number).removesuffix(".weight").rpartition(".")[0]
    before = {name: stack.model.get_submodule(name) for name in (norm, attention)}
    stack.model.set_submodule(norm, nn.Identity())
    stack.model.set_submodule(attention, _Nothing())
    try:
        yield
    finally:
        for name, module in before.items():
            stack.model.set_submodule(name, module)


def _run(
    stack: LayerStack,
    number: int,
    prepared: Prepared,
    hidden_BTD: torch.Tensor,
    inputs_of: tuple[nn.Module, ...],
    *,
    until: nn.Module | None = None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """The layer's output, or what `until` reads, and what each module of `inputs_of` reads."""
    seen: dict[nn.Module, torch.Tensor] = {}

    def note(module: nn.Module) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            seen[module] = arguments[0]
            if module is until:
                raise _Reached

        return hook

    watched = (*inputs_of, *((until,) if until is not None else ()))
    handles = [m.register_forward_pre_hook(note(m)) for m in watched]
    out: torch.Tensor | None = None
    try:
        with suppress(_Reached):
            out = stack.run_layer(number, prepared, hidden_BTD)
    finally:
        for handle in handles:
            handle.remove()
    end = seen[until] if until is not None else out
    if end is None:
        raise ValueError(f"layer {number} ended before the module that it was run for")
    return end, tuple(seen[m] for m in inputs_of)
