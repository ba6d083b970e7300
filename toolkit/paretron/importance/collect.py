"""One forward pass that leaves nothing but sums: width statistics and block influence together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from paretron.errors import Code, ParetronError, Problem
from paretron.importance.executor import Batch, LayerStack
from paretron.importance.statistics import AxisStatistics, over_positions
from paretron.importance.taps import Tap, find_taps, tapped


@dataclass(frozen=True)
class Observed:
    """What one pass leaves: statistics of every width axis, cosines of every block of layers.

    `cosines[n][i]` sums, over tokens, cos(input of layer i, output of layer i + n - 1).
    """

    tokens: int
    axes: Mapping[str, AxisStatistics]
    cosines: Mapping[int, torch.Tensor]

    def merged(self, other: Observed) -> Observed:
        """What one pass over both sets of samples would have left."""
        return Observed(
            self.tokens + other.tokens,
            {axis: s.merged(other.axes[axis]) for axis, s in self.axes.items()},
            {n: c + other.cosines[n] for n, c in self.cosines.items()},
        )

    def influence(self) -> dict[int, tuple[float, ...]]:
        """Block influence 1 - E[cos] of every block of n layers (paper 1, section 2.2)."""
        return {n: tuple((1 - c / self.tokens).tolist()) for n, c in sorted(self.cosines.items())}


def batches_of(windows: Sequence[torch.Tensor], micro_batch: int) -> Iterator[Batch]:
    """Consecutive samples in batches, the short ones padded on the right with token 0.

    INPUT_CORPUS when a sample has no token.
    """
    for start in range(0, len(windows), micro_batch):
        some = windows[start : start + micro_batch]
        lengths = tuple(len(w) for w in some)
        if min(lengths) == 0:
            raise ParetronError(
                Problem(
                    Code.INPUT_CORPUS,
                    "a calibration sample without tokens",
                    fix="name a text with more tokens than one window",
                )
            )
        yield Batch(torch.nn.utils.rnn.pad_sequence(list(some), batch_first=True), lengths)


@torch.no_grad()
def observe(
    stack: LayerStack,
    config: Mapping[str, Any],
    batches: Iterable[Batch],
    *,
    block_sizes: Iterable[int] = (1,),
) -> Observed:
    """Run the batches through the layers and the final norm once; lm_head is never run.

    Padding does not count. Errors: GATE_NONFINITE naming the module whose activations are NaN or
    infinite, INPUT_CORPUS when there is no batch, INPUT_FAMILY when a tap finds no module.
    """
    taps = find_taps(stack.family, config)
    sums = _Sums(taps, len(stack), sorted(set(block_sizes)))
    tokens = 0
    with tapped(stack.model, taps, sums.add_activation):
        for batch in batches:
            sums.lengths = batch.lengths
            tokens += sum(batch.lengths)
            _forward(stack, batch, sums)
        if not tokens:
            raise ParetronError(
                Problem(Code.INPUT_CORPUS, "no calibration sample", fix="name a text that has some")
            )
    return Observed(tokens, sums.axes(), sums.cosines)


def _forward(stack: LayerStack, batch: Batch, sums: _Sums) -> None:
    prepared = stack.prepare(batch.ids_BT)
    hidden = prepared.hidden_BTD
    recent = [hidden]  # the inputs of the last layers, as far back as the longest block reaches
    for i in range(len(stack)):
        hidden = stack.run_layer(i, prepared, hidden)
        recent = [*recent[-max(sums.block_sizes) :], hidden]
        sums.add_cosines(i, recent)
    stack.final_norm(hidden)


class _Sums:
    """The running sums of one pass."""

    def __init__(self, taps: tuple[Tap, ...], num_layers: int, block_sizes: list[int]) -> None:
        self.lengths: tuple[int, ...] = ()
        self.block_sizes = block_sizes
        self.cosines = {
            n: torch.zeros(num_layers - n + 1, dtype=torch.float64) for n in block_sizes
        }
        self._taps = taps
        of_axis: dict[str, list[Tap]] = {}
        for tap in taps:
            of_axis.setdefault(tap.axis, []).append(tap)
        self._row = [of_axis[tap.axis].index(tap) for tap in taps]
        self._zeros = {a: AxisStatistics.zeros(len(t), t[0].units) for a, t in of_axis.items()}
        self._samples = dict.fromkeys(range(len(taps)), 0)

    def add_activation(self, number: int, activation: torch.Tensor) -> None:
        tap, row = self._taps[number], self._row[number]
        into = self._zeros[tap.axis]
        for sample, length in zip(activation, self.lengths, strict=True):
            three = over_positions(tap.unit_values(sample[:length])).cpu()
            if not torch.isfinite(three).all():
                raise _nonfinite(tap.module)
            into.sums[row] += three
            into.squares[row] += three.square()
        self._samples[number] += len(self.lengths)

    def add_cosines(self, layer: int, recent: list[torch.Tensor]) -> None:
        """After `layer` ran: `recent` ends with its output, before it the inputs of the last."""
        for n in self.block_sizes:
            if n > layer + 1:
                break
            start, end = recent[-1 - n], recent[-1]
            for a, b, length in zip(start, end, self.lengths, strict=True):
                cosine = _cosines(a[:length], b[:length]).sum(dtype=torch.float64).cpu()
                if not torch.isfinite(cosine):
                    raise _nonfinite(f"the output of layer {layer}")
                self.cosines[n][layer + 1 - n] += cosine

    def axes(self) -> dict[str, AxisStatistics]:
        counts = {self._taps[k].axis: n for k, n in self._samples.items()}
        return {
            axis: AxisStatistics(counts[axis], s.sums, s.squares) for axis, s in self._zeros.items()
        }


def _cosines(a_TD: torch.Tensor, b_TD: torch.Tensor) -> torch.Tensor:
    a, b = a_TD.float(), b_TD.float()
    norms = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    return torch.linalg.vecdot(a, b) / norms.clamp(min=torch.finfo(torch.float32).tiny)


def _nonfinite(module: str) -> ParetronError:
    return ParetronError(
        Problem(
            Code.GATE_NONFINITE,
            "its activations are NaN or infinite",
            where=module,
            fix="check the checkpoint's weights, or score in a wider dtype",
        )
    )
