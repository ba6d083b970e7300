"""Teacher and student as layers that come and go: one of each is in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from paretron.artifacts.held import in_memory
from paretron.artifacts.partial import empty_model, fill
from paretron.artifacts.reader import Checkpoint
from paretron.families import Tensor, family_of
from paretron.importance.executor import LayerStack, Prepared

_NOWHERE = Path("student")  # named in errors about its config


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
        """While open, layer `number` has these tensors, named as on disk."""
        held = in_memory(tensors, self.family, self._config)
        prefix = f"{self._layers_name}.{number}."
        state = {n.removeprefix(prefix): t.to(self._device) for n, t in held.items()}
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


def module_of(stack: LayerStack, row: Tensor, number: int) -> nn.Module:
    """The module of a row's weight in a layer."""
    name: str = row.name.format(i=number).removesuffix(".weight")
    return stack.model.get_submodule(name)


@torch.no_grad()
def run_layer(
    stack: LayerStack,
    number: int,
    prepared: Prepared,
    hidden_BTD: torch.Tensor,
    *,
    inputs_of: tuple[nn.Module, ...] = (),
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
