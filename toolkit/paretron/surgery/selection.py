"""Which units and layers stay: from scores and target sizes to kept numbers, in original order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from paretron.errors import Code, ParetronError, Problem
from paretron.families import Sizes
from paretron.importance.scores import Scores, rank
from paretron.recipe import Score
from paretron.surgery.slicing import Kept

PRUNABLE = ("hidden", "layers", "kv_heads", "q_per_kv", "ffn")


@dataclass(frozen=True)
class HeadRanks:
    """Query heads of one layer, from the most to the least important, before any is dropped.

    `groups` [kv_heads kept, q_per_kv] ranks the heads inside each kept KV group; `heads` [kv_heads]
    ranks whole heads, and is there where every head has keys and values of its own.
    """

    groups: torch.Tensor
    heads: torch.Tensor | None = None


@dataclass(frozen=True)
class Selection:
    """What stays of a model: `layers` by number, units of the shared axes, units inside layers.

    An axis that loses nothing is not listed. `units[i]` belongs to layer i of the SOURCE. Unit
    numbers are ascending; "q_per_kv" is [kv_heads kept, query heads kept], numbered inside the
    group.
    """

    layers: tuple[int, ...]
    shared: Kept
    units: Mapping[int, Kept]
    head_ranks: Mapping[int, HeadRanks]

    def kept(self, layer: int | None) -> Kept:
        """What slices a tensor of that layer, or one outside of the layers."""
        return self.shared if layer is None else {**self.shared, **self.units[layer]}


def choose(scores: Scores, *, sizes: Sizes, score: Score) -> Selection:
    """Keep the best units of every axis down to the target `sizes`.

    Channels are ranked over the whole model, neurons and KV groups inside their layer, query heads
    inside their KV group; `score` says how activations are aggregated and layers are ranked.
    Errors: RECIPE_TARGET when a size is out of reach or the scores do not hold that depth.
    """
    have = scores.info.sizes
    check_target(have, sizes)

    def values(axis: str, layer: int | None = None) -> torch.Tensor:
        return scores.values(axis, layer, batch=score.batch, sequence=score.sequence)

    def best(axis: str, layer: int | None = None) -> dict[str, torch.Tensor]:
        """The kept units of an axis, nothing where none goes."""
        lost = sizes[axis] < have[axis]
        return {axis: _top(values(axis, layer), sizes[axis])} if lost else {}

    layers = _choose_layers(scores, sizes["layers"], score)
    units: dict[int, Kept] = {}
    ranks: dict[int, HeadRanks] = {}
    for i in layers:
        heads = values("heads", i).view(have["kv_heads"], have["q_per_kv"])
        groups_kept = best("kv_heads", i)
        groups = rank(heads[groups_kept.get("kv_heads", slice(None))])
        queries_kept = {}
        if sizes["q_per_kv"] < have["q_per_kv"]:
            queries_kept = {"q_per_kv": groups[:, : sizes["q_per_kv"]].sort(dim=-1).values}
        units[i] = best("ffn", i) | groups_kept | queries_kept
        ranks[i] = HeadRanks(groups, rank(heads[:, 0]) if have["q_per_kv"] == 1 else None)
    return Selection(layers, best("hidden"), units, ranks)


def check_target(have: Sizes, want: Sizes) -> None:
    """RECIPE_TARGET, one problem an axis, for sizes that trimming cannot reach."""
    problems = []
    for axis, size in have.items():
        new = want[axis]
        if axis in PRUNABLE and not 1 <= new <= size:
            allowed = f"from 1 to {size}"
        elif axis not in PRUNABLE and new != size:
            allowed = f"{size}: this axis is never pruned"
        else:
            continue
        problems.append(Problem(Code.RECIPE_TARGET, f"{new} of {size}", where=axis, fix=allowed))
    if problems:
        raise ParetronError(*problems)


def _top(values: torch.Tensor, count: int) -> torch.Tensor:
    return rank(values)[:count].sort().values


def _choose_layers(scores: Scores, count: int, score: Score) -> tuple[int, ...]:
    """The layers that stay; equal candidates are decided for the lower number."""
    total, depth = scores.info.sizes["layers"], score.depth
    lost = total - count
    if not lost:
        return tuple(range(total))
    if depth.metric == "bi" and not depth.contiguous:
        influence = scores.info.influence[1]
        gone = sorted(range(total), key=lambda i: (influence[i], i))[:lost]
    elif depth.contiguous:
        cost = _block_cost(scores, lost, depth.metric)
        start = min(range(len(cost)), key=lambda i: (cost[i], i))
        gone = list(range(start, start + lost))
    else:
        order = scores.info.losses.greedy if scores.info.losses else ()
        if len(order) < lost:
            raise _not_scored(lost, "one by one")
        gone = [layer for layer, _ in order[:lost]]
    return tuple(i for i in range(total) if i not in gone)


def _block_cost(scores: Scores, lost: int, metric: str) -> Sequence[float]:
    if metric == "bi":
        table: Mapping[int, Sequence[float]] = scores.info.influence
    else:
        table = scores.info.losses.blocks if scores.info.losses else {}
    if lost not in table:
        raise _not_scored(lost, "as one block")
    return table[lost]


def _not_scored(lost: int, how: str) -> ParetronError:
    return ParetronError(
        Problem(
            Code.RECIPE_TARGET,
            f"the scores do not say what removing {lost} layers {how} costs",
            where="layers",
            fix="score with a recipe that has this student, and the same score.depth",
        )
    )
