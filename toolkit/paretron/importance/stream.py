"""A checkpoint larger than memory, run layer by layer: a layer's weights are there while it runs.

All samples pass a layer before the next one is read, so that a pass reads every weight once. Their
hidden states wait in `HiddenStates`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from paretron.artifacts.held import held_parameters
from paretron.artifacts.partial import empty_model, fill
from paretron.artifacts.reader import Checkpoint
from paretron.importance.executor import LayerStack, Part, Prepared


class StreamedStack(LayerStack):
    """The layers of a checkpoint on disk; `loaded` brings one part of it into memory.

    Only the final norm is there all the time. `bytes_read` counts what was read from disk. A tied
    head is read as the embedding that it is.
    """

    def __init__(self, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(empty_model(checkpoint, dtype=dtype), checkpoint.family)
        self.bytes_read = 0
        self._checkpoint = checkpoint
        self._held = held_parameters(checkpoint.family, checkpoint.config)
        self._dtype = dtype
        self._device = device
        self._arguments: dict[tuple[int, ...], Prepared] = {}
        for name, buffer in self.model.named_buffers():
            owner, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(owner), leaf, buffer.to(device))
        fill(self._norm, self._weights(f"{self._norm_name}."), where=self._norm_name)

    @property
    def device(self) -> torch.device:
        """Where weights go when they are loaded."""
        return self._device

    @property
    def streamed(self) -> bool:
        """Weights are in memory only while `loaded` says so."""
        return True

    @contextmanager
    def loaded(self, part: Part) -> Iterator[None]:
        """While open, the weights of one layer (by number), the embedding or the head are there.

        Errors: those of reading a tensor, GATE_RELOAD when names and modules do not fit.
        """
        module, prefix, where = self._part(part)
        empty = fill(module, self._weights(prefix), where=where)
        try:
            yield
        finally:
            fill(module, empty, where=where)

    def prepare(self, ids_BT: torch.Tensor) -> Prepared:
        """As of a whole model; masks and rotary angles are held once for each shape of batch."""
        prepared = super().prepare(ids_BT)
        first = self._arguments.setdefault(tuple(ids_BT.shape), prepared)
        return Prepared(prepared.hidden_BTD, first.arguments)

    def _part(self, part: Part) -> tuple[nn.Module, str, str]:
        if isinstance(part, int):
            name = f"{self._layers_name}.{part}"
            return self.layers[part], f"{name}.", name
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        names = {module: f"{name}." for name, module in self.model.named_modules()}
        if part == "embeddings":
            return embedding, names[embedding], part
        tied = not any(held.name.startswith(names[head]) for held in self._held)
        return head, names[embedding if tied else head], part

    def _weights(self, prefix: str) -> dict[str, torch.Tensor]:
        """What the disk holds below a prefix, in the running dtype on the running device."""
        return {
            held.name.removeprefix(prefix): held.from_disk(self._read).to(self._device, self._dtype)
            for held in self._held
            if held.name.startswith(prefix)
        }

    def _read(self, name: str) -> torch.Tensor:
        self.bytes_read += self._checkpoint.entries[name].nbytes
        return self._checkpoint.read(name)
