"""What is kept: the best units, in their original order, and the cheapest layers gone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from makers import PicoMaker
from paretron.artifacts.reader import Checkpoint
from paretron.errors import Code, ParetronError
from paretron.families import sizes
from paretron.importance.scores import Scores
from paretron.recipe import Score
from paretron.surgery.selection import Selection, choose
from picoscores import random_scores


@pytest.fixture
def scores(pico: PicoMaker) -> Scores:
    path = pico("mistral", num_attention_heads=12, num_key_value_heads=3, num_hidden_layers=6)
    return random_scores(Checkpoint.open(path))


def _choose(scores: Scores, depth: dict[str, object] | None = None, **new: int) -> Selection:
    score = Score.model_validate({"depth": depth or {}})
    return choose(scores, sizes={**scores.info.sizes, **new}, score=score)


def test_everything_kept_lists_nothing(scores: Scores) -> None:
    selection = _choose(scores)
    assert selection.layers == tuple(range(6))
    assert not selection.shared
    assert not any(selection.units.values())


def test_channels_and_neurons_are_the_best_in_original_order(scores: Scores) -> None:
    selection = _choose(scores, hidden=10, ffn=20)
    values = scores.values("hidden", batch="l2", sequence="mean")
    assert selection.shared["hidden"].tolist() == sorted(values.topk(10).indices.tolist())
    for layer in range(6):
        values = scores.values("ffn", layer, batch="l2", sequence="mean")
        assert selection.units[layer]["ffn"].tolist() == sorted(values.topk(20).indices.tolist())


def test_groups_by_their_sum_and_queries_inside_their_group(scores: Scores) -> None:
    selection = _choose(scores, kv_heads=2, q_per_kv=3)
    for layer in range(6):
        heads = scores.values("heads", layer, batch="l2", sequence="mean").view(3, 4)
        groups = sorted(heads.sum(1).topk(2).indices.tolist())
        kept = selection.units[layer]
        assert kept["kv_heads"].tolist() == groups
        assert kept["q_per_kv"].tolist() == [
            sorted(heads[g].topk(3).indices.tolist()) for g in groups
        ]
        ranks = selection.head_ranks[layer]
        assert torch.equal(ranks.groups, heads[groups].argsort(descending=True))
        assert ranks.heads is None


def test_block_with_the_lowest_loss_goes(scores: Scores) -> None:
    losses = scores.info.losses
    assert losses is not None
    for lost in (1, 2, 5):
        start = min(range(6 - lost + 1), key=lambda i: losses.blocks[lost][i])
        selection = _choose(scores, layers=6 - lost)
        assert selection.layers == tuple(i for i in range(6) if not start <= i < start + lost)
        assert set(selection.units) == set(selection.layers)


def test_block_with_the_lowest_influence_goes(scores: Scores) -> None:
    influence = scores.info.influence[3]
    start = min(range(4), key=lambda i: influence[i])
    selection = _choose(scores, {"metric": "bi"}, layers=3)
    assert selection.layers == tuple(i for i in range(6) if not start <= i < start + 3)


def test_one_by_one_by_loss_follows_the_greedy_order(scores: Scores) -> None:
    losses = scores.info.losses
    assert losses is not None
    removed = {layer for layer, _ in losses.greedy[:3]}
    selection = _choose(scores, {"contiguous": False}, layers=3)
    assert selection.layers == tuple(i for i in range(6) if i not in removed)


def test_one_by_one_by_influence(scores: Scores) -> None:
    influence = scores.info.influence[1]
    removed = sorted(range(6), key=lambda i: influence[i])[:2]
    selection = _choose(scores, {"metric": "bi", "contiguous": False}, layers=4)
    assert selection.layers == tuple(i for i in range(6) if i not in removed)


def test_equal_scores_go_by_number(scores: Scores) -> None:
    flat = {
        axis: replace(s, sums=torch.ones_like(s.sums), squares=torch.ones_like(s.squares))
        for axis, s in scores.statistics.items()
    }
    info = scores.info.model_copy(update={"influence": {2: (0.5,) * 5}})
    selection = _choose(
        Scores(info, flat), {"metric": "bi"}, hidden=8, ffn=8, kv_heads=2, q_per_kv=2, layers=4
    )
    assert selection.layers == (2, 3, 4, 5)
    assert selection.shared["hidden"].tolist() == list(range(8))
    for kept in selection.units.values():
        assert kept["ffn"].tolist() == list(range(8))
        assert kept["kv_heads"].tolist() == [0, 1]
        assert kept["q_per_kv"].tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize(
    "new",
    [{"hidden": 65}, {"ffn": 0}, {"layers": 7}, {"head_dim": 16}, {"vocab": 100}, {"q_per_kv": 5}],
)
def test_sizes_out_of_reach(scores: Scores, new: dict[str, Any]) -> None:
    with pytest.raises(ParetronError) as caught:
        _choose(scores, **new)
    (problem,) = caught.value.problems
    assert problem.code is Code.RECIPE_TARGET
    assert problem.where == next(iter(new))


@pytest.mark.parametrize("depth", [{}, {"metric": "bi"}, {"contiguous": False}])
def test_a_depth_that_was_not_scored(scores: Scores, depth: dict[str, object]) -> None:
    info = scores.info.model_copy(update={"losses": None, "influence": {1: (0.1,) * 6}})
    with pytest.raises(ParetronError) as caught:
        _choose(Scores(info, scores.statistics), depth, layers=3)
    assert caught.value.problems[0].code is Code.RECIPE_TARGET


def test_sizes_are_those_of_the_source(scores: Scores, pico: PicoMaker) -> None:
    checkpoint = Checkpoint.open(pico("qwen3", name="other"))
    assert random_scores(checkpoint).info.sizes == sizes(checkpoint.family, checkpoint.config)
