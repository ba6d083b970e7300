"""Group P: what pruning must get right, a row an id.

The checks themselves live beside the code that they hold; here each row stands under its id, for
every family where the row says so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoConfig

from families.test_published_shapes import SHAPES
from faults.conftest import Cli, Refused
from faults.test_recipe_rows import RECIPE
from importance import test_statistics as statistics
from importance import test_taps as taps
from makers import PicoMaker
from paretron.artifacts.reader import Checkpoint
from paretron.errors import Code, ParetronError
from paretron.families import FAMILIES, Family, expected_tensors, parameter_counts, sizes
from paretron.importance.collect import Observed, batches_of, observe
from paretron.importance.executor import Batch, LayerStack
from paretron.importance.score import score_windows
from paretron.importance.scores import Scores, rank
from paretron.importance.statistics import aggregate
from paretron.recipe import Score
from paretron.recipe.searching import Budget, Space
from paretron.search.candidates import all_hold
from paretron.search.costs import measures
from paretron.search.space import shapes_of
from pico import MOE_FAMILIES, PICO_FAMILIES, pico_model
from picoscores import prune_to
from reload import check_reload
from surgery import test_prune as pruning
from surgery import test_tables as tables

TESTS = Path(__file__).parents[1]


EVERY = (*PICO_FAMILIES, *MOE_FAMILIES)
# Where layers are of two kinds, a count depends on which layers stay, and a budget on the scores.
ONE_KIND = tuple(family for family in EVERY if family != "qwen3_moe")


@pytest.mark.parametrize("family", EVERY)
def test_p1_a_reordered_axis_moves_no_logit(family: str) -> None:
    tables.test_permutation_oracle(family)


def test_p2_a_broken_table_is_caught() -> None:
    """All families: tests/surgery."""
    tables.test_every_broken_table_is_caught("mistral")


@pytest.mark.parametrize("family", EVERY)
def test_p3_keeping_everything(family: str, pico: PicoMaker) -> None:
    pruning.test_keeping_everything_is_byte_identical(pico, family, "bfloat16")


# P4: the table, the library's own plan for splitting a model over devices, published counts.

CUT = {"kv_heads", "ffn", "moe_ffn"}  # axes that are divided between devices


def split_by_table(family: Family) -> dict[str, str]:
    """Each matrix of a layer by its module: are its rows or its columns what is divided?"""
    found = {}
    for row in family.tensors:
        if row.per_layer and len(row.dims) == 2:
            module = row.name.removesuffix(".weight").replace("{i}", "*")
            for held, parts in family.held.items():
                if row.name in parts or row.name.rpartition(".layers.{i}.")[2] in parts:
                    module = held.removesuffix(".weight").replace("{i}", "*")
            written, read = ({axis for seg in dim for axis in seg} & CUT for dim in row.dims)
            if written or read:
                found[module.removeprefix("model.")] = "colwise" if written else "rowwise"
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_p4_the_table_and_the_library_s_tensor_parallel_plan(family: str) -> None:
    plan = type(AutoConfig.for_model(family)).base_model_tp_plan
    if plan is None:
        pytest.skip(f"the library has no plan for {family}")
    theirs = {
        module: "colwise" if "colwise" in how else "rowwise"
        for module, how in plan.items()
        if "colwise" in how or "rowwise" in how
    }
    assert split_by_table(FAMILIES[family]) == theirs


@pytest.mark.parametrize("family", EVERY)
def test_p4_the_table_and_the_state_dict(family: str) -> None:
    tables.test_table_equals_state_dict(family, {})


@pytest.mark.parametrize("name", SHAPES)
def test_p4_published_counts(name: str) -> None:
    shape = SHAPES[name]
    counts = parameter_counts(FAMILIES[shape.model_type], shape.config)
    assert (counts.total, counts.non_embedding) == (shape.total, shape.non_embedding)
    assert len(SHAPES) == 8


def test_p5_lists_with_an_entry_a_layer(pico: PicoMaker) -> None:
    pruning.test_layer_types_go_with_their_layers(pico)


def test_p5_an_unknown_list_with_an_entry_a_layer(
    pico: PicoMaker, refused: Refused, tmp_path: Path
) -> None:
    path = pico() / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"window_of_layer": [1, 0, 1, 0]}))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("{hidden: 48}", "{layers: 2}"))
    refused("plan", recipe, code=Code.INPUT_CONFIG, names="window_of_layer")


@pytest.mark.parametrize("family", EVERY)
def test_p6_a_tap_that_matches_nothing(family: str) -> None:
    model = pico_model(family, num_hidden_layers=2)
    rows = FAMILIES[family].tensors
    reader = FAMILIES[family].readers("q_per_kv")[0]
    renamed = replace(reader, name=reader.name.replace("self_attn", "attention"))
    broken = replace(FAMILIES[family], tensors=tuple(renamed if r is reader else r for r in rows))
    windows = batches_of([torch.arange(5)], micro_batch=1)
    with pytest.raises(ParetronError) as caught:
        observe(LayerStack(model, broken), model.config.to_dict(), windows)
    (problem,) = caught.value.problems
    assert problem.code is Code.INPUT_FAMILY
    assert "attention" in problem.where


def test_p6_a_tap_that_is_never_run() -> None:
    taps.test_tap_that_never_fires_is_an_error()


# P7: batches, order and processes change neither scores nor rankings.

WINDOWS = [
    torch.randint(0, 320, (n,), generator=torch.Generator().manual_seed(n))
    for n in (33, 64, 7, 50, 21, 40, 12, 64)
]


def observed(family: str, windows: list[torch.Tensor], *, micro_batch: int) -> Observed:
    model = pico_model(family, num_hidden_layers=2)
    return statistics._observe(model, windows, micro_batch)


def assert_equal_scores(one: Observed, two: Observed) -> None:
    assert one.tokens == two.tokens
    for axis in one.axes:
        a, b = (aggregate(o.axes[axis], batch="l2", sequence="mean") for o in (one, two))
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * float(a.max()))
        assert torch.equal(rank(a), rank(b)), axis
    assert torch.allclose(
        torch.tensor(one.influence()[1]), torch.tensor(two.influence()[1]), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("family", EVERY)
def test_p7_batches_and_order(family: str) -> None:
    whole = observed(family, WINDOWS, micro_batch=8)
    assert_equal_scores(observed(family, WINDOWS, micro_batch=1), whole)
    assert_equal_scores(observed(family, WINDOWS[::-1], micro_batch=3), whole)


def test_p7_two_ranks(pico: PicoMaker, cli: Cli, tmp_path: Path) -> None:
    """The command itself, alone and as two processes under torchrun."""
    model, recipe = pico(), tmp_path / "recipe.yaml"
    (tmp_path / "calibration.txt").write_text("the cat sat on the mat and the dog ran " * 60)
    text = RECIPE.replace("{corpus: stdlib, part: calibration, seq_len: 64}",
                          "{path: calibration.txt, samples: 9, seq_len: 24}")  # fmt: skip
    recipe.write_text(text + "score: {micro_batch: 2}\n")
    scores = []
    for processes in (1, 2):
        out, set_ = tmp_path / f"by-{processes}", f"score.processes={processes}"
        arguments = ("score", model, "--recipe", recipe, "--set", set_, "--out", out, "-q")
        outcome = cli(*arguments)
        assert outcome.code == 0, outcome
        scores.append(Scores.load(out))
    one, two = (s.info for s in scores)
    assert one.tokens == two.tokens == 9 * 24
    for axis in ("hidden", "ffn", "heads"):
        for layer in (None,) if axis == "hidden" else range(4):
            a, b = (s.values(axis, layer, batch="l2", sequence="mean") for s in scores)
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * float(a.max()))
            assert torch.equal(rank(a), rank(b))


def test_p7_ties_go_to_the_lower_number() -> None:
    assert rank(torch.tensor([1.0, 2.0, 2.0, 0.0, 2.0])).tolist() == [1, 2, 4, 0, 3]


# P8: calibration texts that are none, and what becomes of those that are too long.


@pytest.mark.parametrize("windows", [[], [torch.arange(5), torch.arange(0)]], ids=len)
def test_p8_no_tokens(windows: list[torch.Tensor], pico: PicoMaker) -> None:
    with pytest.raises(ParetronError) as caught:
        score_windows(Checkpoint.open(pico(num_hidden_layers=2)), windows, score=Score())
    assert caught.value.exit_code == 3


def test_p8_all_padding(pico: PicoMaker) -> None:
    model = pico_model(num_hidden_layers=2)
    nothing = Batch(torch.zeros(2, 5, dtype=torch.long), (0, 0))
    with pytest.raises(ParetronError) as caught:
        observe(LayerStack(model, FAMILIES["llama"]), model.config.to_dict(), [nothing])
    assert caught.value.exit_code == 3


def test_p8_one_token(pico: PicoMaker) -> None:
    """Widths can be scored on it; a loss needs a token before another."""
    checkpoint = Checkpoint.open(pico(num_hidden_layers=2))
    scores = score_windows(checkpoint, [torch.tensor([7])], score=Score())
    assert all(s.sums.isfinite().all() for s in scores.statistics.values())
    with pytest.raises(ParetronError) as caught:
        score_windows(checkpoint, [torch.tensor([7])], score=Score(), block_sizes=(1,))
    assert caught.value.exit_code == 3


def test_p8_longer_than_the_context(pico: PicoMaker, refused: Refused, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("calibration, seq_len: 64", "calibration, seq_len: 513"))
    refused(
        "score", pico(), "--recipe", recipe, "--out", tmp_path / "scores",
        code=Code.INPUT_CORPUS, names=("513", "512"),
    )  # fmt: skip


# P10: what was written loads elsewhere, strictly, and computes what it computed here.


def test_p10_a_fresh_process_computes_the_same(pico: PicoMaker, tmp_path: Path) -> None:
    folders = []
    for family in EVERY:
        model = pico(family, name=f"{family}/model")
        folders.append(tmp_path / family / "out")
        prune_to(model, folders[-1], hidden=48, layers=3, kv_heads=1, merge_heads=True)
    code = reload_elsewhere(tmp_path / "logits.safetensors", *folders)
    assert code == 0
    logits = load_file(tmp_path / "logits.safetensors")
    assert set(logits) == set(EVERY)
    for folder in folders:
        assert torch.equal(logits[folder.parent.name], check_reload(folder))


def reload_elsewhere(target: Path, *folders: Path) -> int:
    worker = Path(__file__).with_name("reload_worker.py")
    return subprocess.run(
        [sys.executable, str(worker), str(target), *map(str, folders)],
        env=os.environ | {"PYTHONPATH": str(TESTS)},
        check=False,
    ).returncode


# P11: any target that can be had gives what the table says of the new config.


@settings(max_examples=25)
@given(data=st.data(), family=st.sampled_from(ONE_KIND))
def test_p11_any_feasible_target(
    data: st.DataObject, family: str, pico_of: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The largest shape of a drawn space that a drawn budget allows, cut and counted on disk."""
    model = pico_of(family)
    checkpoint = Checkpoint.open(model)
    have = sizes(checkpoint.family, checkpoint.config)
    whole_rows = "experts" in have or checkpoint.family.hidden_multiple_of_heads
    step = data.draw(st.sampled_from((8, 16) if whole_rows else (1, 8, 16)))
    space = Space.model_validate(
        {
            axis: {"from": step, "to": have[axis], "multiple": step}
            for axis in ("hidden", "ffn", "moe_ffn")
            if axis in have
        }
        | {"layers": {"from": 1, "to": have["layers"]}}
    )
    shapes = shapes_of(space, have)
    whole = parameter_counts(checkpoint.family, checkpoint.config).total
    most = data.draw(st.integers(whole // 6, whole), label="budget")
    budget = measures(
        Budget.model_validate({"params": most}), shapes,
        family=checkpoint.family, config=checkpoint.config, dtype="F32",
    )  # fmt: skip
    within = shapes.of(all_hold(shapes, budget))
    new = data.draw(
        st.sampled_from([within.at(i) for i in range(0, len(within), 7)]), label="shape"
    )
    out = tmp_path_factory.mktemp("p11") / "out"
    prune_to(model, out, merge_heads=False, scores=None, **new)
    written = Checkpoint.open(out)
    assert sizes(written.family, written.config) == have | new
    assert {n: e.shape for n, e in written.entries.items()} == expected_tensors(
        written.family, written.config
    )
    assert sum(torch.Size(e.shape).numel() for e in written.entries.values()) <= most
    assert all(new[axis] % step == 0 for axis in ("hidden", "ffn", "moe_ffn") if axis in new)


@pytest.fixture(scope="module")
def pico_of(_pico_cache: PicoMaker) -> PicoMaker:
    """Checkpoints that are only read, so that no example copies one."""
    return _pico_cache
