"""Several rounds as one cut: what is composed is what cutting twice leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from makers import PicoMaker
from paretron.artifacts.reader import Checkpoint
from paretron.families import sizes
from paretron.recipe import Prune, Score
from paretron.surgery.prune import write_pruned
from paretron.surgery.rounds import composed, round_sizes
from paretron.surgery.selection import choose
from picoscores import random_scores

HEADS = {"num_attention_heads": 12, "num_key_value_heads": 3}
CASES = {
    "all axes": ("mistral", HEADS, {"hidden": 40, "ffn": 60, "kv_heads": 2, "q_per_kv": 3},
                 {"hidden": 24, "ffn": 30, "q_per_kv": 2, "layers": 3}),
    "groups after heads": ("mistral", HEADS, {"q_per_kv": 2, "layers": 2},
                           {"kv_heads": 1, "ffn": 30}),
    "heads of their own": ("olmo2", {"num_key_value_heads": 4}, {"kv_heads": 3}, {"kv_heads": 2}),
    "joined matrices": ("phi3", {}, {"ffn": 60, "kv_heads": 1}, {"ffn": 20, "hidden": 48}),
    "norms over writes": ("gemma2", {}, {"hidden": 52, "layers": 3}, {"hidden": 36}),
    "experts": ("qwen3_moe", {}, {"experts": 3, "moe_ffn": 32, "ffn": 40},
                {"experts": 2, "moe_ffn": 16, "layers": 3}),
    "experts, then neurons": ("mixtral", {}, {"experts": 2}, {"moe_ffn": 24}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_cut_is_what_two_leave(pico: PicoMaker, tmp_path: Path, case: str) -> None:
    family, config, first_sizes, then_sizes = CASES[case]
    teacher = Checkpoint.open(pico(family, **config))
    have = sizes(teacher.family, teacher.config)
    prune, score = Prune(merge_heads=False), Score()
    folders = [tmp_path / name for name in ("middle", "twice", "once")]
    for folder in folders:
        folder.mkdir()
    size = have | first_sizes
    first = choose(random_scores(teacher), sizes=size, score=score)
    write_pruned(teacher, first, folders[0], sizes=size, prune=prune)
    middle = Checkpoint.open(folders[0])
    size = size | then_sizes
    then = choose(random_scores(middle, seed=1), sizes=size, score=score)
    write_pruned(middle, then, folders[1], sizes=size, prune=prune)
    both = composed(first, then, have=have)
    write_pruned(teacher, both, folders[2], sizes=size, prune=prune)
    twice, once = Checkpoint.open(folders[1]), Checkpoint.open(folders[2])
    assert once.config == twice.config
    for name in twice.entries:
        torch.testing.assert_close(once.read(name), twice.read(name), rtol=1e-6, atol=0)


@pytest.mark.parametrize("groups", [3, 12])
def test_survivors_by_their_last_ranking_then_those_that_went(
    pico: PicoMaker, tmp_path: Path, groups: int
) -> None:
    """Merging gives to kept heads what pruned ones had, by one ranking over all rounds."""
    teacher = Checkpoint.open(
        pico("mistral", num_attention_heads=12, num_key_value_heads=groups, num_hidden_layers=1)
    )
    have = sizes(teacher.family, teacher.config)
    axis = "kv_heads" if groups == 12 else "q_per_kv"
    one, two = (have | {axis: have[axis] - n} for n in (1, 2))
    scores = random_scores(teacher)
    first = choose(scores, sizes=one, score=Score())
    write_pruned(teacher, first, tmp_path, sizes=one, prune=Prune(merge_heads=False))
    later = random_scores(Checkpoint.open(tmp_path), seed=1)
    both = composed(first, choose(later, sizes=two, score=Score()), have=have)
    rows = 3 if axis == "q_per_kv" else 1
    before, after = (
        s.values("heads", 0, batch="l2", sequence="mean").view(rows, -1) for s in (scores, later)
    )
    for row in range(rows):
        order = before[row].argsort(descending=True)
        left = order[: one[axis]].sort().values
        wanted = torch.cat((left[after[row].argsort(descending=True)], order[one[axis] :]))
        ranks = both.head_ranks[0]
        found = ranks.groups[row] if ranks.heads is None else ranks.heads
        assert torch.equal(found, wanted)
        kept = both.units[0][axis]
        assert torch.equal(kept[row] if rows > 1 else kept, wanted[: two[axis]].sort().values)


@given(
    rounds=st.integers(1, 9), have=st.integers(1, 5000), gone=st.integers(0, 4999)
)  # fmt: skip
def test_rounds_go_down_evenly_to_the_target(rounds: int, have: int, gone: int) -> None:
    score, want = Score(rounds=rounds), max(1, have - gone)
    way = [score.after(done, have=have, want=want) for done in range(rounds + 1)]
    assert (way[0], way[-1]) == (have, want)
    for done, size in enumerate(way):
        assert abs(size - (have - done * (have - want) / rounds)) <= 0.5


def test_a_hidden_size_on_the_way_is_one_that_the_config_takes(pico: PicoMaker) -> None:
    """A Llama with biases takes multiples of its heads alone: 86 would be a third of the way."""
    teacher = Checkpoint.open(
        pico(hidden_size=96, num_attention_heads=6, num_key_value_heads=3, attention_bias=True)
    )  # fmt: skip
    have = sizes(teacher.family, teacher.config)
    want = have | {"hidden": 66, "q_per_kv": 1, "ffn": 33}
    found = round_sizes(teacher.family, teacher.config, have=have, want=want, score=Score(rounds=3))
    assert len(found) == 3
    assert found[-1] == want
    for size in found:
        heads = size["kv_heads"] * size["q_per_kv"]
        assert size["hidden"] % heads == 0
    assert [size["ffn"] for size in found] == [75, 54, 33]
    hidden = [96, *(size["hidden"] for size in found)]
    assert hidden == sorted(hidden, reverse=True)
