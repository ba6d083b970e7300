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

PRUNABLE = ("hidden", "layers", "kv_heads", "q_per_kv", "ffn", "experts", "moe_ffn")


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
    group, and "moe_ffn" [experts kept, neurons kept].
    """

    layers: tuple[int, ...]
    shared: Kept
    units: Mapping[int, Kept]
    head_ranks: Mapping[int, HeadRanks]

    def kept(self, layer: int | None, expert: int | None = None) -> Kept:
        """What slices a tensor of that layer, or one outside of the layers.

        `expert` is the place of the tensor's expert among those that stay.
        """
        if layer is None:
            return self.shared
        units = self.units[layer]
        if expert is not None and "moe_ffn" in units:
            units = {**units, "moe_ffn": units["moe_ffn"][expert]}
        return {**self.shared, **units}

    def source_expert(self, layer: int | None, expert: int | None) -> int | None:
        """The number in the source of the expert at that place among those that stay."""
        if layer is None or expert is None:
            return None
        kept = self.units[layer].get("experts")
        return expert if kept is None else int(kept[expert])


def choose(scores: Scores, *, sizes: Sizes, score: Score) -> Selection:
    """Keep the best units of every axis down to the target `sizes`.

    Channels are ranked over the whole model, neurons, experts and KV groups inside their layer,
    query heads inside their KV group, an expert's neurons inside it; `score` says how activations
    are aggregated and layers are ranked.
    Errors: RECIPE_TARGET when a size is out of reach or the scores do not hold that depth,
    RUN_MISMATCH when they are by another criterion.
    """
    have = scores.info.sizes
    check_target(have, sizes)
    _same_criterion(scores, score)

    def values(axis: str, layer: int | None = None) -> torch.Tensor:
        return scores.values(axis, layer, batch=score.batch, sequence=score.sequence)

    def best(axis: str, layer: int | None = None) -> dict[str, torch.Tensor]:
        """The kept units of an axis, nothing where none goes."""
        if sizes.get(axis) == have.get(axis) or not scores.observed(axis, layer):
            return {}
        return {axis: _top(values(axis, layer), sizes[axis])}

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
        experts_kept = best("experts", i)
        neurons_kept = best("moe_ffn", i)  # of all experts
        if neurons_kept and experts_kept:
            neurons_kept = {"moe_ffn": neurons_kept["moe_ffn"][experts_kept["experts"]]}
        units[i] = best("ffn", i) | groups_kept | queries_kept | experts_kept | neurons_kept
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
    return rank(values)[..., :count].sort(dim=-1).values


def _choose_layers(scores: Scores, count: int, score: Score) -> tuple[int, ...]:
    """The layers that stay; equal candidates are decided for the lower number."""
    total, depth = scores.info.sizes["layers"], score.depth
    lost = total - count
    if not lost:
        return tuple(range(total))
    if not depth.contiguous and depth.metric not in ("loss", "task"):
        alone = _block_cost(scores, 1, depth.metric)
        gone = sorted(range(total), key=lambda i: (alone[i], i))[:lost]
    elif depth.contiguous:
        cost = _block_cost(scores, lost, depth.metric)
        start = min(range(len(cost)), key=lambda i: (cost[i], i))
        gone = list(range(start, start + lost))
    else:
        found = scores.info.accuracies if depth.metric == "task" else scores.info.losses
        order = found.greedy if found else ()
        if len(order) < lost:
            raise _not_scored(lost, "one by one")
        gone = [layer for layer, _ in order[:lost]]
    return tuple(i for i in range(total) if i not in gone)


def _block_cost(scores: Scores, lost: int, metric: str) -> Sequence[float]:
    """What removing each block of so many layers costs: lower is better.

    By magnitude and taylor a block is worth the sum of its layers; by random as much as its first
    one, so that every block is equally likely to go.
    """
    info = scores.info
    if metric in ("random", "magnitude", "taylor"):
        if metric not in info.layer_values:
            raise _not_scored(lost, f"by {metric}")
        each, last = info.layer_values[metric], 1 if metric == "random" else lost
        return [sum(each[i : i + last]) for i in range(len(each) - lost + 1)]
    table: Mapping[int, Sequence[float]] = {
        "bi": info.influence,
        "angular": info.angular,
        "loss": info.losses.blocks if info.losses else {},
        "task": info.accuracies.blocks if info.accuracies else {},
    }[metric]
    if lost not in table:
        raise _not_scored(lost, "as one block")
    return [-x for x in table[lost]] if metric == "task" else table[lost]


def _same_criterion(scores: Scores, score: Score) -> None:
    if scores.info.criterion != score.criterion:
        raise ParetronError(
            Problem(
                Code.RUN_MISMATCH,
                f"the scores are by {scores.info.criterion}, not by {score.criterion}",
                where="score.criterion",
                fix=f"score.criterion: {scores.info.criterion}, or run `paretron score` again",
            )
        )


def _not_scored(lost: int, how: str) -> ParetronError:
    return ParetronError(
        Problem(
            Code.RECIPE_TARGET,
            f"the scores do not say what removing {lost} layers {how} costs",
            where="layers",
            fix="score with a recipe that has this student, and the same score.depth",
        )
    )
