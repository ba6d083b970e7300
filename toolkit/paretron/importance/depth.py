"""What a model becomes without a layer or a block of layers, the common prefix run once.

Removing the block that starts at layer i leaves layers 0 .. i-1 as they are: their hidden states
are carried along, and only what follows the block is run again. Several candidates pass a layer
together, in one call where that is no more than a few thousand tokens; where layers are streamed,
all of them do, so that a pass reads every weight once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from paretron.importance.executor import LayerStack, Prepared
from paretron.importance.measures import Measure
from paretron.importance.states import HiddenStates

Removed = tuple[int, ...]  # the numbers of the layers that are gone
Total = Callable[[torch.Tensor], torch.Tensor]  # sums over all processes

# Tokens of several candidates in one call of a layer: more gain nothing.
_TOKENS_TOGETHER = {"cpu": 1 << 11, "cuda": 1 << 15}
_MOST_TOGETHER = 16
_PREFIX = 0  # the slot of the hidden states of the common prefix


@dataclass(frozen=True)
class Removals:
    """The measure's value: `baseline` with all layers, `blocks[n][i]` without the n from i on."""

    baseline: float
    blocks: dict[int, tuple[float, ...]]


@dataclass(frozen=True)
class Evaluator:
    """Evaluates what is left of a model, through a measure.

    `known` holds values from before, which are not computed again; `on_value` hears of each new
    one as soon as it is there. `states` says where hidden states wait.
    """

    stack: LayerStack
    measure: Measure
    total: Total = lambda sums: sums
    known: Mapping[Removed, float] = field(default_factory=dict)
    on_value: Callable[[Removed, float], None] = lambda removed, value: None
    states: Callable[[], HiddenStates] = HiddenStates

    @torch.no_grad()
    def values(
        self, layers: Sequence[int], cuts: Iterable[tuple[int, int]]
    ) -> dict[Removed, float]:
        """The measure without each cut, a range (start, end) of `layers`, those still there.

        With L layers and all blocks of n, the layers run L + (L - n) (L - n + 1) / 2 times a
        batch. (Paper 1, section 2.2: PPL; paper 2: blocks, tasks.)
        """
        gone = set(range(len(self.stack))) - set(layers)
        removed = {cut: tuple(sorted(gone | set(layers[slice(*cut)]))) for cut in cuts}
        found = {key: self.known[key] for key in removed.values() if key in self.known}
        left = sorted(cut for cut, key in removed.items() if key not in found)
        if left:
            with self.states() as states:
                for cut, value in _Pass(self, layers, states).run(left):
                    found[removed[cut]] = value
                    self.on_value(removed[cut], value)
        return {key: found[key] for key in removed.values()}


def block_removals(evaluator: Evaluator, *, block_sizes: Iterable[int]) -> Removals:
    """The measure without every contiguous block of n layers, for every n of `block_sizes`."""
    total = len(evaluator.stack)
    sizes = sorted(set(block_sizes))
    cuts = [(i, i + n) for n in sizes for i in range(total - n + 1)]
    values = evaluator.values(range(total), [*cuts, (total, total)])
    blocks = {n: tuple(values[tuple(range(i, i + n))] for i in range(total - n + 1)) for n in sizes}
    return Removals(values[()], blocks)


def greedy_removal(evaluator: Evaluator, *, rounds: int) -> tuple[tuple[int, float], ...]:
    """Layers removed one by one, each time the one that leaves the best measure.

    Returns (layer, the measure without it and those before it) in the order of removal; ties go to
    the lower layer.
    """
    left = list(range(len(evaluator.stack)))
    removed: list[tuple[int, float]] = []
    for _ in range(rounds):
        values = list(evaluator.values(left, [(k, k + 1) for k in range(len(left))]).values())
        best = min(range(len(left)), key=lambda k: evaluator.measure.cost(values[k]))
        removed.append((left.pop(best), values[best]))
    return tuple(removed)


class _Pass:
    """One way through the layers for some cuts, in groups that travel together."""

    def __init__(self, evaluator: Evaluator, layers: Sequence[int], states: HiddenStates) -> None:
        self._stack, self._measure, self._total = (
            evaluator.stack, evaluator.measure, evaluator.total,
        )  # fmt: skip
        self._layers = layers
        self._states = states
        self._batches = evaluator.measure.batches
        tokens = max((b.ids_BT.numel() for b in self._batches), default=1)
        limit = _TOKENS_TOGETHER["cpu" if self._stack.device.type == "cpu" else "cuda"]
        # Candidates in one call of a layer.
        self._together = min(max(1, limit // tokens), _MOST_TOGETHER)
        # What a layer is called with depends on a batch's shape alone.
        self._prepared: dict[tuple[torch.Size, int], Prepared] = {}

    def run(self, cuts: Sequence[tuple[int, int]]) -> Iterator[tuple[tuple[int, int], float]]:
        """Each cut and its value, in the order of where they start."""
        self._prepare()
        at_once = len(cuts) if self._stack.streamed else self._together
        position = 0
        for first in range(0, len(cuts), at_once):
            group = cuts[first : first + at_once]
            self._advance(group, position)
            position = group[-1][0]
            with self._stack.loaded("head"):
                for slot, cut in enumerate(group, 1):
                    yield cut, self._value(slot)

    def _prepare(self) -> None:
        with self._stack.loaded("embeddings"):
            for k, batch in enumerate(self._batches):
                entering = self._stack.prepare(batch.ids_BT)
                self._states[_PREFIX, k] = entering.hidden_BTD
                shape = batch.ids_BT.shape
                if (shape, 1) in self._prepared:
                    continue
                for times in range(1, self._together + 1):
                    many = self._stack.prepare(batch.ids_BT.repeat(times, 1))
                    self._prepared[shape, times] = many.without_hidden()

    def _advance(self, group: Sequence[tuple[int, int]], position: int) -> None:
        """The prefix goes from `position` to where the last cut starts, every cut to the end."""
        last = group[-1][0]
        for j in range(position, len(self._layers) + 1):
            for slot, (start, _) in enumerate(group, 1):
                if start == j:
                    for k in range(len(self._batches)):
                        self._states[slot, k] = self._states[_PREFIX, k]
            slots = [slot for slot, (start, end) in enumerate(group, 1) if end <= j]
            slots = [_PREFIX, *slots] if j < last else slots
            if j < len(self._layers) and slots:
                self._run_layer(self._layers[j], slots)

    def _run_layer(self, layer: int, slots: Sequence[int]) -> None:
        with self._stack.loaded(layer):
            for k, batch in enumerate(self._batches):
                for first in range(0, len(slots), self._together):
                    some = slots[first : first + self._together]
                    hidden = [self._states[slot, k] for slot in some]
                    out = self._stack.run_layer(
                        layer, self._prepared[batch.ids_BT.shape, len(some)], torch.cat(hidden)
                    )
                    for slot, part in zip(some, out.split(len(batch.lengths)), strict=True):
                        self._states[slot, k] = part

    def _value(self, slot: int) -> float:
        sums = self._measure.nothing()
        for k in range(len(self._batches)):
            sums += self._measure.part(self._stack, self._states[slot, k], k)
        return self._measure.value(self._total(sums))
