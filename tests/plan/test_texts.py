"""What `plan` says of texts and phases before anything is read or downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from makers import PicoMaker
from paretron.artifacts.hub import DatasetContents
from paretron.data import datasets
from paretron.errors import Code, ParetronError, Problem
from paretron.plan.plan import Plan, make_plan
from paretron.recipe import resolve_recipe

COMMIT = "c" * 40


@pytest.fixture
def plan(pico: PicoMaker, tmp_path: Path) -> Any:
    (tmp_path / "a.txt").write_text("the cat sat on the mat")
    teacher = pico()

    def made(train: dict[str, Any], **distill: Any) -> Plan:
        text = {"path": str(tmp_path / "a.txt"), "seq_len": 32}
        raw: dict[str, Any] = {
            "schema": 1,
            "teacher": {"model": str(teacher)},
            "data": {"calibration": text, "train": text | train, "validation": text},
            "students": {"small": {"layers": 2}},
            "distill": {"tokens": 1280, "global_batch": 4} | distill,
        }
        for source in (raw["data"]["train"], raw["distill"]):
            for key in [key for key, value in source.items() if value is None]:
                del source[key]
        recipe = resolve_recipe(raw, where="recipe.yaml", base=tmp_path)
        return make_plan(recipe, out=tmp_path / "out", offline=True)

    return made


def problem(plan: Plan, where: str) -> Problem:
    (found,) = [p for p in plan.problems if p.where == where]
    return found


def test_every_phase_is_looked_at(plan: Any) -> None:
    phases = [
        {"seq_len": 128, "tokens": 500, "global_batch": 4},
        {"seq_len": 1024, "tokens": 1024, "global_batch": 1},
    ]
    found = plan({"tokens": 100}, tokens=None, phases=phases)
    assert "512 of" not in str(found.problems)
    assert (
        "500 tokens are less than one step of 512"
        in problem(found, "distill.phases.0.tokens").cause
    )
    longer = [p.cause for p in found.problems if p.where == "distill.phases.1.seq_len"]
    assert "1024 is longer than the teacher's context of 512" in longer
    assert "1024 tokens a window, but the text is cut after 100" in longer


def test_a_longer_phase_costs_more(plan: Any) -> None:
    def flops(*lengths: int) -> int:
        phases = [{"seq_len": n, "tokens": 12800, "global_batch": 4} for n in lengths]
        made: Plan = plan({}, tokens=None, phases=phases)
        assert not made.problems
        return made.estimates["small.distill"].flops

    assert flops(32) < flops(256)
    assert flops(32) + flops(256) == flops(32, 256)
    one: Plan = plan({}, tokens=12800)
    assert flops(32) == one.estimates["small.distill"].flops


def test_relations_of_whole_windows_go_with_joined_documents_alone(plan: Any) -> None:
    loss = {"states": {"attention": [[1, 1]]}}
    assert not plan({}, loss=loss).problems
    found = plan({"documents": "apart"}, loss=loss)
    assert problem(found, "distill.loss.states.attention").code is Code.RECIPE_VALUE


def test_a_dataset_is_planned_at_its_commit(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, bool]] = []

    def contents(dataset: str, *, revision: str, offline: bool) -> DatasetContents:
        asked.append((dataset, revision, offline))
        if dataset == "o/none":
            raise ParetronError(Problem(Code.INPUT_OFFLINE, "not here", where=dataset, fix="x"))
        return DatasetContents(COMMIT, ("train.jsonl",), {})

    monkeypatch.setattr(datasets, "dataset_contents", contents)
    sources = [
        {"dataset": "o/n", "weight": 1, "revision": "v2"},
        {"dataset": "o/none", "weight": 1},
        {"dataset": "o/n", "weight": 1, "split": "odd"},
    ]
    found: Plan = plan({"path": None, "sources": sources, "tokens": 1280})
    assert asked == [("o/n", "v2", True), ("o/none", "main", True), ("o/n", "main", True)]
    assert [s.revision for s in found.recipe.data.train.parts] == [COMMIT, None, None]
    (data,) = [stage for stage in found.stages if stage.kind == "data"]
    assert data.settings["data"]["train"]["sources"][0]["revision"] == COMMIT
    wrong = {p.where: p.code for p in found.problems}
    assert wrong["data.train.sources.1: o/none"] is Code.INPUT_OFFLINE
    assert wrong[f"data.train.sources.2: o/n@{COMMIT[:12]}"] is Code.INPUT_CORPUS


def test_a_source_without_a_file_is_named(plan: Any, tmp_path: Path) -> None:
    sources = [{"path": str(tmp_path / "a.txt"), "weight": 1}, {"path": "none.jsonl", "weight": 1}]
    found: Plan = plan({"path": None, "sources": sources, "tokens": 1280})
    (missing,) = found.problems
    assert missing.where.startswith("data.train.sources.1.path: ")
