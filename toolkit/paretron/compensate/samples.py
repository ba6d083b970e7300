"""The calibration samples: which are fitted to, which measured, and the stream they make."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from paretron.compensate.basis import covariance_sum
from paretron.compensate.model import pass_half
from paretron.compensate.trimmed import Trimmed
from paretron.importance.collect import batches_of
from paretron.importance.executor import Batch, LayerStack, Prepared
from paretron.importance.states import HiddenStates
from paretron.importance.stream import StreamedStack

BEFORE = 0  # slot of the teacher's hidden states before a layer
_BATCH_TOKENS = 8192
_TOKENS_AT_ONCE = 1024  # whose wide copies exist at a time


@dataclass(frozen=True)
class Samples:
    """What a walk runs on: matrices are fitted to `fit`, figures are of `held`, which may be the
    same."""

    fit: tuple[Batch, ...]
    held: tuple[Batch, ...]

    @property
    def all(self) -> tuple[Batch, ...]:
        """Every batch once; those of `fit` first."""
        return self.fit if self.held is self.fit else (*self.fit, *self.held)

    @property
    def held_numbers(self) -> range:
        """Where the batches of `held` stand in `all`."""
        return range(len(self.all) - len(self.held), len(self.all))


def split_samples(windows: Sequence[torch.Tensor], *, micro_batch: int) -> Samples:
    """One window in eight is held back, the last ones; a single window serves for both.

    A batch has at most `micro_batch` windows, fewer where they are long: attention's half of a
    layer is run for a whole batch.
    """
    held = max(1, len(windows) // 8)
    micro_batch = max(1, min(micro_batch, _BATCH_TOKENS // max(len(w) for w in windows)))
    measured = tuple(batches_of(windows[-held:], micro_batch))
    if len(windows) == 1:
        return Samples(measured, measured)
    return Samples(tuple(batches_of(windows[:-held], micro_batch)), measured)


@torch.no_grad()
def stream_covariance(
    teacher: StreamedStack, trimmed: Trimmed, batches: Sequence[Batch], states: HiddenStates
) -> torch.Tensor:
    """Second moments of what every norm of the teacher reads, token-normalised, fp64 [D, D]."""
    width = trimmed.checkpoint.config["hidden_size"]
    total = torch.zeros((width, width), dtype=torch.float64, device=teacher.device)
    prepared = prepare_all(teacher, trimmed, batches, states)

    def count(stream_BTD: torch.Tensor, batch: Batch) -> None:
        for some in tokens(stream_BTD, batch):
            total.add_(covariance_sum(some, norm=teacher.family.norm))

    for i in range(len(teacher)):
        rows = trimmed.halves(i)
        with teacher.loaded(i):
            for b, batch in enumerate(batches):
                stream = states[BEFORE, b]
                for half in (0, 1):
                    count(stream, batch)
                    stream = pass_half(teacher, i, half, rows, prepared[b], stream)
                states[BEFORE, b] = stream
    for b, batch in enumerate(batches):
        count(states[BEFORE, b], batch)
    return total


def counting(batch: Batch) -> torch.Tensor:
    """Which positions are no padding, bool [B * T]."""
    positions = torch.arange(batch.ids_BT.shape[1])
    return (positions < torch.tensor(batch.lengths)[:, None]).flatten()


def tokens(x_BTD: torch.Tensor, batch: Batch) -> Iterator[torch.Tensor]:
    """The positions that count, [n, D], a few at a time."""
    for sample, length in zip(x_BTD, batch.lengths, strict=True):
        yield from sample[:length].split(_TOKENS_AT_ONCE)


@torch.no_grad()
def prepare_all(
    teacher: LayerStack, trimmed: Trimmed, batches: Sequence[Batch], states: HiddenStates
) -> list[Prepared]:
    """What every layer is called with; the teacher's embedded tokens wait in slot BEFORE."""
    of_shape: dict[tuple[int, ...], Prepared] = {}
    out = []
    for b, batch in enumerate(batches):
        found = teacher.prepare_embedded(trimmed.embedded(batch.ids_BT))
        states[BEFORE, b] = found.hidden_BTD
        out.append(of_shape.setdefault(tuple(batch.ids_BT.shape), found.without_hidden()))
    return out
