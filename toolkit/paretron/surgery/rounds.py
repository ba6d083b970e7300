"""Pruning in rounds: the sizes on the way, and several selections as one of the original model.

Iterative importance (paper 1, section 2.2): of T rounds the i-th ranks at size
ds - i (ds - dt) / T and prunes to ds - (i + 1) (ds - dt) / T, on all axes at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from paretron.artifacts.config import relabel
from paretron.errors import ParetronError
from paretron.families import Family, Sizes
from paretron.families.table import with_sizes
from paretron.recipe import Score
from paretron.surgery.selection import HeadRanks, Selection
from paretron.surgery.slicing import Kept


def round_sizes(
    family: Family, config: Mapping[str, Any], *, have: Sizes, want: Sizes, score: Score
) -> tuple[dict[str, int], ...]:
    """The sizes after each of the rounds, whole numbers; the last are `want`.

    KV groups and the query heads of a group are rounded each for itself, so groups stay whole.
    Where the config class refuses the hidden size it is the nearest between target and last round
    that it takes; a round for which there is none prunes nothing.
    """
    found: list[dict[str, int]] = []
    before = dict(have)
    for done in range(1, score.rounds):
        ideal = {a: score.after(done, have=have[a], want=want[a]) for a in have}
        shapes = (ideal | {"hidden": h} for h in _nearest(ideal["hidden"], want, before))
        before = next((s for s in shapes if _accepted(family, config, s, have)), before)
        found.append(before)
    return (*found, dict(want))


def composed(first: Selection, then: Selection, *, have: Sizes) -> Selection:
    """What stays after both, in unit numbers of the model that `first` is of, of sizes `have`.

    `then` is of the model that `first` leaves. Heads are ranked as late as they were there.
    """
    layers = tuple(first.layers[k] for k in then.layers)
    units: dict[int, Kept] = {}
    ranks: dict[int, HeadRanks] = {}
    for new, old in zip(then.layers, layers, strict=True):
        one, two = first.units[old], then.units[new]
        units[old] = (
            _picked(one, two, ("ffn", "kv_heads", "experts"))
            | _nested(one, two, inner="q_per_kv", outer="kv_heads", have=have)
            | _nested(one, two, inner="moe_ffn", outer="experts", have=have)
        )
        ranks[old] = _ranks(first.head_ranks[old], then.head_ranks[new], one, two)
    return Selection(layers, _picked(first.shared, then.shared, ("hidden",)), units, ranks)


def _nearest(ideal: int, want: Sizes, before: Sizes) -> Iterator[int]:
    between = range(want["hidden"], before["hidden"] + 1)
    yield from sorted(between, key=lambda h: (abs(h - ideal), -h))


def _accepted(family: Family, config: Mapping[str, Any], size: Sizes, have: Sizes) -> bool:
    kept = None if size["layers"] == have["layers"] else tuple(range(size["layers"]))
    try:
        relabel(with_sizes(family, config, size, kept_layers=kept))
    except ParetronError:
        return False
    return True


def _picked(one: Kept, two: Kept, axes: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Axes whose units are a list: those of `two` are numbers into those of `one`."""
    found = {axis: one[axis] for axis in axes if axis in one}
    return found | {a: found[a][two[a]] if a in found else two[a] for a in axes if a in two}


def _nested(
    one: Kept, two: Kept, *, inner: str, outer: str, have: Sizes
) -> dict[str, torch.Tensor]:
    """An axis whose units are listed for each unit of another one, [outer kept, inner kept]."""
    if inner not in one and inner not in two:
        return {}
    numbers = one[inner] if inner in one else _all(one, inner, outer, have)
    if outer in two:
        numbers = numbers[two[outer]]
    return {inner: numbers.gather(-1, two[inner]) if inner in two else numbers}


def _all(one: Kept, inner: str, outer: str, have: Sizes) -> torch.Tensor:
    count = len(one[outer]) if outer in one else have[outer]
    return torch.arange(have[inner]).expand(count, -1)


def _ranks(first: HeadRanks, then: HeadRanks, one: Kept, two: Kept) -> HeadRanks:
    """Survivors by their last ranking, behind them those that went before, by theirs."""
    groups = first.groups
    left = then.groups.shape[1]
    numbers = groups[:, :left].sort(dim=-1).values
    if "kv_heads" in two:
        groups, numbers = groups[two["kv_heads"]], numbers[two["kv_heads"]]
    joined = torch.cat((numbers.gather(-1, then.groups), groups[:, left:]), dim=-1)
    if first.heads is None or then.heads is None:
        return HeadRanks(joined)
    kept = len(then.heads)
    order = one["kv_heads"][then.heads] if "kv_heads" in one else then.heads
    return HeadRanks(joined, torch.cat((order, first.heads[kept:])))
