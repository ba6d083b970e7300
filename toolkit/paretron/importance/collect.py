"""One forward pass that leaves nothing but sums: width statistics and block influence together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from paretron.errors import Code, ParetronError, Problem
from paretron.importance.executor import Batch, LayerStack, Prepared
from paretron.importance.states import HiddenStates
from paretron.importance.statistics import AxisStatistics, over_positions
from paretron.importance.taps import Tap, find_taps, tapped


@dataclass(frozen=True)
class Observed:
    """What one pass leaves: statistics of every width axis, distances over every block of layers.

    `distances[n]` is fp64 [2, blocks]: from the input of layer i to the output of layer i + n - 1,
    summed over tokens, 1 - cos and the angle (arccos) in parts of pi.
    """

    tokens: int
    axes: Mapping[str, AxisStatistics]
    distances: Mapping[int, torch.Tensor]

    def merged(self, other: Observed) -> Observed:
        """What one pass over both sets of samples would have left."""
        return Observed(
            self.tokens + other.tokens,
            {axis: s.merged(other.axes[axis]) for axis, s in self.axes.items()},
            {n: d + other.distances[n] for n, d in self.distances.items()},
        )

    def summed(self, total: Callable[[torch.Tensor], torch.Tensor]) -> Observed:
        """The same with every sum passed through `total`, which adds those of other processes."""
        counts = [self.tokens, *(s.samples for s in self.axes.values())]
        tokens, *samples = total(torch.tensor(counts, dtype=torch.float64)).long().tolist()
        axes = {
            axis: AxisStatistics(count, total(s.sums), total(s.squares))
            for (axis, s), count in zip(self.axes.items(), samples, strict=True)
        }
        return Observed(tokens, axes, {n: total(d) for n, d in self.distances.items()})

    def influence(self) -> dict[int, tuple[float, ...]]:
        """Block influence 1 - E[cos] of every block of n layers (paper 1, section 2.2)."""
        return {n: tuple((d[0] / self.tokens).tolist()) for n, d in sorted(self.distances.items())}

    def angular(self) -> dict[int, tuple[float, ...]]:
        """Mean angle over every block of n layers, from 0 to 1 for pi."""
        return {n: tuple((d[1] / self.tokens).tolist()) for n, d in sorted(self.distances.items())}


def batches_of(windows: Sequence[torch.Tensor], micro_batch: int) -> Iterator[Batch]:
    """Consecutive samples in batches, the short ones padded on the right with token 0.

    INPUT_CORPUS when a sample has no token.
    """
    for start in range(0, len(windows), micro_batch):
        some = windows[start : start + micro_batch]
        lengths = tuple(len(w) for w in some)
        if min(lengths) == 0:
            raise no_tokens()
        yield Batch(torch.nn.utils.rnn.pad_sequence(list(some), batch_first=True), lengths)


def no_tokens() -> ParetronError:
    """INPUT_CORPUS: all of a sample is padding."""
    return ParetronError(
        Problem(
            Code.INPUT_CORPUS,
            "a calibration sample without tokens",
            fix="name a text with more tokens than one window",
        )
    )


def documents_apart(
    windows: Iterable[torch.Tensor], *, eos_token_id: int
) -> Iterator[torch.Tensor]:
    """Each window's documents as samples of their own: it is cut after every end-of-text token."""
    for window in windows:
        ends = (window == eos_token_id).nonzero().flatten() + 1
        yield from (part for part in window.tensor_split(ends.tolist()) if len(part))


@torch.no_grad()
def observe(
    stack: LayerStack,
    config: Mapping[str, Any],
    batches: Iterable[Batch],
    *,
    block_sizes: Iterable[int] = (1,),
    states: HiddenStates | None = None,
    on_batches: Callable[[int, int], None] = lambda layers, samples: None,
) -> Observed:
    """Run the batches through the layers and the final norm once; lm_head is never run.

    Each batch passes all layers in turn, or, where layers are streamed, each layer takes all
    batches, whose hidden states wait in `states`. Padding does not count. `on_batches` hears of
    every layer that so many samples have passed. Errors: GATE_NONFINITE naming the module whose
    activations are NaN or infinite, INPUT_CORPUS when there is no batch, INPUT_FAMILY when a tap
    finds no module.
    """
    taps = find_taps(stack.family, config)
    sums = _Sums(taps, len(stack), sorted(set(block_sizes)))
    tokens = 0
    with tapped(stack.model, taps, sums.add_activation):
        groups = [list(batches)] if stack.streamed else ([batch] for batch in batches)
        for group in groups:
            tokens += sum(length for batch in group for length in batch.lengths)
            if any(min(batch.lengths) == 0 for batch in group):
                raise no_tokens()
            _forward(stack, group, sums, states or HiddenStates(), on_batches)
        if not tokens:
            raise ParetronError(
                Problem(Code.INPUT_CORPUS, "no calibration sample", fix="name a text that has some")
            )
    return Observed(tokens, sums.axes(), sums.distances)


def enter(stack: LayerStack, batches: Sequence[Batch], states: HiddenStates) -> list[Prepared]:
    """Embed every batch into slot 0 of `states`; what layers are called with besides."""
    prepared = []
    with stack.loaded("embeddings"):
        for k, batch in enumerate(batches):
            entering = stack.prepare(batch.ids_BT)
            states[0, k] = entering.hidden_BTD
            prepared.append(entering.without_hidden())
    return prepared


def _forward(
    stack: LayerStack,
    batches: Sequence[Batch],
    sums: _Sums,
    states: HiddenStates,
    on_batches: Callable[[int, int], None],
) -> None:
    """Hidden states are kept as far back as the longest block reaches, in rotating slots."""
    longest = max(sums.block_sizes)
    slots = longest + 1
    prepared = enter(stack, batches, states)
    for i in range(len(stack)):
        with stack.loaded(i):
            for k, batch in enumerate(batches):
                sums.lengths = batch.lengths
                hidden = stack.run_layer(i, prepared[k], states[i % slots, k])
                for n in sums.sizes_ending_with(i):
                    sums.add_distances(n, i, states[(i + 1 - n) % slots, k], hidden)
                states[(i + 1) % slots, k] = hidden
                on_batches(1, len(batch.lengths))
    for k, batch in enumerate(batches):
        sums.lengths = batch.lengths
        stack.final_norm(states[len(stack) % slots, k])


class _Sums:
    """The running sums of one pass."""

    def __init__(self, taps: tuple[Tap, ...], num_layers: int, block_sizes: list[int]) -> None:
        self.lengths: tuple[int, ...] = ()
        self.block_sizes = block_sizes
        self.distances = {
            n: torch.zeros((2, num_layers - n + 1), dtype=torch.float64) for n in block_sizes
        }
        self._taps = taps
        of_axis: dict[str, list[Tap]] = {}
        self._row: list[int] = []
        for tap in taps:
            own = of_axis.setdefault(tap.axis, [])
            self._row.append(len(own))
            own.append(tap)
        self._zeros = {a: AxisStatistics.zeros(len(t), t[0].units) for a, t in of_axis.items()}
        self._samples = dict.fromkeys(range(len(taps)), 0)

    def add_activation(
        self, number: int, activation: torch.Tensor, here: torch.Tensor | None = None
    ) -> None:
        tap, row = self._taps[number], self._row[number]
        into = self._zeros[tap.axis]
        for values, zeros in self._samples_of(activation, here):
            three = over_positions(tap.unit_values(values), zeros=zeros).cpu()
            if not math.isfinite(float(three.sum())):  # none of them is negative
                raise _nonfinite(tap.module)
            into.sums[row] += three
            into.squares[row] += three.square()
        self._samples[number] += len(self.lengths)

    def _samples_of(
        self, activation: torch.Tensor, here: torch.Tensor | None
    ) -> Iterator[tuple[torch.Tensor, int]]:
        """The rows of every sample without its padding, and how many positions have none."""
        if here is None:
            for sample, length in zip(activation, self.lengths, strict=True):
                yield sample[:length], 0
            return
        here_BT = here.unflatten(0, (len(self.lengths), -1))
        samples = activation.split(here_BT.sum(1).tolist())
        for sample, mask, length in zip(samples, here_BT, self.lengths, strict=True):
            valid = int(mask[:length].sum())  # padding is on the right, so these come first
            yield sample[:valid], length - valid

    def sizes_ending_with(self, layer: int) -> list[int]:
        """The sizes of the blocks that end with this layer."""
        return [n for n in self.block_sizes if n <= layer + 1]

    def add_distances(
        self, size: int, layer: int, start_BTD: torch.Tensor, end_BTD: torch.Tensor
    ) -> None:
        """Of the block of `size` layers that ends with `layer`: what went in and what came out."""
        into = self.distances[size][:, layer + 1 - size]
        for start, end, length in zip(start_BTD, end_BTD, self.lengths, strict=True):
            both = _distances(start[:length], end[:length])
            if not torch.isfinite(both).all():
                raise _nonfinite(f"the output of layer {layer}")
            into += both

    def axes(self) -> dict[str, AxisStatistics]:
        counts = {self._taps[k].axis: n for k, n in self._samples.items()}
        return {
            axis: AxisStatistics(counts[axis], s.sums, s.squares) for axis, s in self._zeros.items()
        }


def _distances(start_TD: torch.Tensor, end_TD: torch.Tensor) -> torch.Tensor:
    """1 - cos and the angle in parts of pi, summed over positions: fp64 [2].

    From the chord between the unit vectors, s: cos = 1 - s^2 / 2, the angle is 2 arcsin(s / 2).
    The product of the vectors would leave nothing of a small angle.
    """
    chord_T = torch.linalg.vector_norm(_unit(start_TD).sub_(_unit(end_TD)), dim=-1).double()
    angle_T = torch.asin((chord_T / 2).clamp(max=1)) * (2 / math.pi)
    return torch.stack((chord_T.square().sum() / 2, angle_T.sum())).cpu()


def _unit(states_TD: torch.Tensor) -> torch.Tensor:
    """Vectors of length 1, in fp32 at least; a zero vector stays one. Never the input itself."""
    wide = states_TD if states_TD.dtype == torch.float64 else states_TD.float()
    norms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return wide / norms.clamp(min=torch.finfo(torch.float32).tiny)


def _nonfinite(module: str) -> ParetronError:
    return ParetronError(
        Problem(
            Code.GATE_NONFINITE,
            "its activations are NaN or infinite",
            where=module,
            fix="check the checkpoint's weights, or score in a wider dtype",
        )
    )
