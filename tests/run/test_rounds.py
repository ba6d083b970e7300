"""Iterative importance end to end: rounds rank what is left, a killed one goes on, one is none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from makers import PicoMaker
from paretron.artifacts.manifest import Provenance
from paretron.artifacts.reader import Checkpoint
from paretron.data.store import TokenStore, sample_windows
from paretron.data.tokens import build_token_store
from paretron.errors import Code, ParetronError
from paretron.families import Sizes, sizes
from paretron.importance.score import score_windows
from paretron.importance.stage import score_model
from paretron.plan.plan import make_plan
from paretron.recipe import Prune, Recipe, Score, load_recipe, resolve_recipe
from paretron.run import rounds
from paretron.run.pruning import prune_model
from paretron.surgery.prune import write_pruned
from paretron.surgery.selection import choose
from pico import pico_tokenizer
from picorun import RECIPE, write_pico_recipe

TARGET = {"ffn": 32, "hidden": 40, "q_per_kv": 1, "layers": 2}
SCORE = {"rounds": 2, "micro_batch": 2, "depth": {"samples": 2}}
TRIM = {"prune": {"merge_heads": False}, "compensate": {"rotate": False, "refit": False}}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    text = "the cat sat on the mat, and the dog ran after it; def main(self): return 1\n" * 40
    build_token_store([text], pico_tokenizer(), tmp_path / "store", eos_token_id=1)
    return tmp_path / "store"


def _recipe(folder: Path, **sections: Any) -> Recipe:
    data = RECIPE["data"] | {"calibration": {"path": "text.txt", "samples": 4, "seq_len": 16}}
    raw = RECIPE | {"data": data, "score": SCORE, "seed": 5} | sections
    return resolve_recipe(raw, where="recipe", base=folder)


def _silent(kind: str, fields: Mapping[str, object]) -> None:
    """Nobody listens."""


def _prune(model: Path, folder: Path, recipe: Recipe, out: str) -> Checkpoint:
    """Score where that is not done yet, and prune."""
    scores, store = folder / "scores", folder / "store"
    calibration = recipe.data.calibration
    if not scores.exists():
        score_model(
            model, store, score=recipe.score, calibration_settings=calibration, block_sizes=(1,),
            seed=5, out=scores, provenance=Provenance(kind="score"), on_event=_silent,
        )  # fmt: skip
    checkpoint = Checkpoint.open(model)
    prune_model(
        model, scores, store, recipe=recipe, out=folder / out, state=folder / "state",
        sizes=sizes(checkpoint.family, checkpoint.config) | TARGET,
        provenance=Provenance(kind="prune"), on_event=_silent,
    )  # fmt: skip
    return Checkpoint.open(folder / out)


def _by_hand(model: Path, folder: Path, score: Score) -> Checkpoint:
    """Score, trim, score what is left, trim that."""
    windows = list(sample_windows(TokenStore.open(folder / "store"), 4, 16, 5))
    steps: list[Sizes] = [{"ffn": 64, "hidden": 52, "q_per_kv": 1, "layers": 3}, TARGET]
    for k, step in enumerate(steps):
        checkpoint = Checkpoint.open(model)
        size = {**sizes(checkpoint.family, checkpoint.config), **step}
        found = score_windows(checkpoint, windows, score=score, block_sizes=(1,), seed=5)
        model = folder / f"step-{k}"
        model.mkdir()
        selection = choose(found, sizes=size, score=score)
        write_pruned(checkpoint, selection, model, sizes=size, prune=Prune(merge_heads=False))
    return Checkpoint.open(model)


def test_two_rounds_are_scoring_and_cutting_twice(
    pico: PicoMaker, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while it scores what is left, it goes on there; finished scores stay."""
    model, recipe = pico("mistral"), _recipe(tmp_path, **TRIM)

    def dies(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rounds, "score_model", dies)
        _prune(model, tmp_path, recipe, "out")
    (trimmed,) = (tmp_path / "state").glob("*/model")
    found = _prune(model, tmp_path, recipe, "out")
    assert not trimmed.exists()  # it may be as large as the teacher
    wanted = _by_hand(model, tmp_path, recipe.score)
    for name in wanted.entries:
        assert torch.equal(found.read(name), wanted.read(name))
    monkeypatch.setattr(rounds, "score_model", dies)
    refitted = _prune(model, tmp_path, _recipe(tmp_path, compensate={"rotate": False}), "refitted")
    name = "model.layers.0.self_attn.v_proj.weight"
    assert refitted.read(name).shape == wanted.read(name).shape
    assert (tmp_path / "refitted" / "compensation.json").is_file()


def test_what_rounds_cost(tmp_path: Path) -> None:
    recipe = write_pico_recipe(
        tmp_path, profile=None, export=[{"to": "hf"}], students={"both": {"ffn": 64, "layers": 2}}
    )
    plans = [
        make_plan(load_recipe(recipe, overrides=[f"score.rounds={n}"]), out=tmp_path, offline=True)
        for n in (1, 2)
    ]
    one, two = (plan.estimates["both.prune"] for plan in plans)
    assert two.flops > one.flops
    assert two.disk_bytes == one.disk_bytes + plans[0].teacher.weight_bytes
    stages = ({s.name: s for s in plan.stages} for plan in plans)
    assert [s["score"].settings["block_sizes"] for s in stages] == [[2], [1]]


def test_a_search_ranks_by_one_scoring(tmp_path: Path) -> None:
    search = {"space": {"ffn": [32, 64]}, "budget": {"params": 10**6}, "rounds": [100]}
    raw = RECIPE | {"students": {"found": {"search": search}}, "score": {"rounds": 2}}
    with pytest.raises(ParetronError) as caught:
        resolve_recipe(raw, where="recipe", base=tmp_path)
    assert caught.value.problems[-1].code is Code.RECIPE_VALUE
    assert "score.rounds must be 1" in str(caught.value)


def test_another_text_is_scored_anew(
    pico: PicoMaker, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, recipe = pico("mistral"), _recipe(tmp_path, **TRIM)
    asked: list[Path] = []

    def counted(model: Path, *given: Any, **stated: Any) -> None:
        asked.append(model)
        score_model(model, *given, **stated)

    monkeypatch.setattr(rounds, "score_model", counted)
    _prune(model, tmp_path, recipe, "first")
    _prune(model, tmp_path, recipe, "again")
    assert len(asked) == 1
    build_token_store(["another text altogether; " * 200], pico_tokenizer(), store, eos_token_id=1)
    _prune(model, tmp_path, recipe, "other")
    assert len(asked) == 2
