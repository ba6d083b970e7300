"""What a run took, from its events; what its family costs; what mattered in its teacher."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from makers import PicoMaker
from paretron.artifacts.reader import Checkpoint
from paretron.families.costs import matrix_flops_per_token
from paretron.plan.cost import ModelFacts
from paretron.plan.plan import Plan, make_plan
from paretron.recipe import Score, load_recipe
from paretron.run.costs import family_cost, run_cost, stage_costs
from paretron.run.importances import COLUMNS, importance_summary
from paretron_profiling.report.details import family_words
from paretron_profiling.report.parts import Cost, Importance
from paretron_profiling.report.schema import Report
from picorun import RECIPE
from picoscores import random_scores
from report_example import example_report

Event = tuple[float, str, str, dict[str, Any]]


def log(path: Path, *events: Event) -> Path:
    lines = [
        json.dumps({"time": time, "stage": stage, "kind": kind} | fields)
        for time, stage, kind, fields in events
    ]
    path.write_text("\n".join(lines) + '\n{"time": 1')  # a kill cut the last line
    return path


def step(time: float, stage: str, number: int, tokens: int) -> Event:
    return time, stage, "step", {"step": number, "tokens": tokens}


def event(time: float, stage: str, kind: str) -> Event:
    return time, stage, kind, {}


@pytest.fixture
def plan(pico: PicoMaker, tmp_path: Path) -> Plan:
    """The plan of a run that is never started."""
    pico(name="teacher")
    for name in ("calibration.jsonl", "train.txt", "validation.txt"):
        (tmp_path / name).write_text('{"text": "a"}\n')
    kept = {k: v for k, v in RECIPE.items() if k not in ("export", "profile")}
    (tmp_path / "recipe.yaml").write_text(json.dumps(kept))
    return make_plan(load_recipe(tmp_path / "recipe.yaml"), out=tmp_path / "out", offline=True)


def test_attempts_of_a_stage_are_added_up(plan: Plan, tmp_path: Path) -> None:
    name = "width.distill"
    events = log(
        tmp_path / "events.jsonl",
        event(100, "score", "started"), event(103, "score", "finished"),
        event(110, name, "started"), step(112, name, 1, 128), step(114, name, 2, 256),
        step(120, name, 3, 384),  # killed here, after the checkpoint of step 2
        event(500, name, "started"), step(504, name, 3, 384), step(506, name, 4, 512),
        event(510, name, "finished"), event(600, name, "reused"),
        event(700, "report", "started"), event(702, "report", "finished"),
        event(800, "another.recipe", "started"), event(900, "another.recipe", "finished"),
    )  # fmt: skip
    assert stage_costs(events, plan) == [
        {"stage": "score", "kind": "score", "seconds": 3.0, "devices": 1, "tokens": None},
        {"stage": name, "kind": "distill", "seconds": 20.0, "devices": 1, "tokens": 640},
    ]
    assert stage_costs(tmp_path / "none.jsonl", plan) == []


def test_devices_count_where_they_are_gpus(plan: Plan, tmp_path: Path) -> None:
    events = log(
        tmp_path / "e", event(0, "width.distill", "started"), event(3600, "width.distill", "failed")
    )
    distill = plan.recipe.distill.model_copy(update={"processes": 4})
    recipe = plan.recipe.model_copy(update={"distill": distill})
    facts = {"teacher": _facts(plan)}
    for is_gpu, device, hours in ((True, "GPU", 4.0), (False, "CPU", 1.0)):
        here = replace(plan, recipe=recipe, hardware=replace(plan.hardware, is_gpu=is_gpu))
        cost = Cost.model_validate(run_cost(events, plan=here, facts=facts))
        assert (cost.device, cost.hours) == (device, hours)


def _facts(plan: Plan) -> ModelFacts:
    assert plan.teacher is not None
    return plan.teacher


def test_the_papers_family_costs_what_the_paper_says(plan: Plan) -> None:
    """4.4e17, 2.5e17 and 1.2e17 FLOPs a step, 40 times fewer tokens: 1.8 times cheaper."""
    base = replace(_facts(plan), attention_flops_per_token_and_position=0)
    flops = {"teacher": 4.4e17, "8b": 2.5e17, "4b": 1.2e17}
    facts = {n: replace(base, forward_flops_per_token=int(f / 3)) for n, f in flops.items()}
    family = family_cost(plan, facts)
    assert family is not None
    assert family["scratch_flops"] / family["flops"] == pytest.approx(1.803, abs=1e-3)
    tokens = plan.recipe.distill.tokens
    assert family["scratch_flops"] == pytest.approx(8.1e17 * 40 * tokens)
    assert "40 times" in family["basis"]
    assert family["all_flops"] != family["flops"]
    content = example_report(cost={"device": "CPU", "stages": [], "family": family})
    assert "costs 1.80× less to train" in family_words(Report.of(content))


def test_a_pretrained_teacher_states_its_tokens(plan: Plan) -> None:
    teacher = plan.recipe.teacher.model_copy(update={"pretrain": _Pretrained})
    known = replace(plan, recipe=plan.recipe.model_copy(update={"teacher": teacher}))
    facts = {"teacher": _facts(plan), "width": _facts(plan)}
    family = family_cost(known, facts)
    assert family is not None
    assert [m["scratch_tokens"] for m in family["members"]] == [5e6, 5e6]
    assert [m["tokens"] for m in family["members"]] == [5e6, plan.recipe.distill.tokens]
    matrices = 3 * matrix_flops_per_token(_family(plan), _config(plan))
    assert family["members"][0]["flops_per_token"] >= matrices


class _Pretrained:
    tokens = 5_000_000


def _config(plan: Plan) -> Any:
    assert plan.teacher_folder is not None
    return Checkpoint.open(plan.teacher_folder).config


def _family(plan: Plan) -> Any:
    assert plan.teacher_folder is not None
    return Checkpoint.open(plan.teacher_folder).family


def test_importance_is_a_few_kilobytes(pico: PicoMaker, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(pico(num_hidden_layers=6))
    scores = random_scores(checkpoint)
    (tmp_path / "scores").mkdir()
    scores.save(tmp_path / "scores")
    score = Score()
    summary = importance_summary(tmp_path / "scores", score)
    checked = Importance.model_validate(summary)
    assert len(json.dumps(summary)) < 20_000
    lost = next(m for m in checked.layers if m.metric.startswith("loss"))
    assert scores.info.losses is not None
    assert lost.values == pytest.approx(scores.info.losses.blocks[1], rel=1e-3)
    axes = {a.axis: a for a in checked.axes}
    assert set(axes) == set(scores.info.axes)
    ffn = axes["ffn"]
    assert (len(ffn.values), len(ffn.values[0])) == (6, COLUMNS)
    whole = scores.places("ffn", batch=score.batch, sequence=score.sequence)
    for row, values in zip(ffn.values, whole, strict=True):
        assert list(row) == sorted((v or 0.0 for v in row), reverse=True)
        ranked = values.sort(descending=True).values.tensor_split(COLUMNS)
        assert row[0] == pytest.approx(float(ranked[0].mean() / _most(whole)), rel=1e-3)


def _most(values: Any) -> Any:
    """The largest mean of a first part, which is 1 in the summary."""
    return max(row.sort(descending=True).values.tensor_split(COLUMNS)[0].mean() for row in values)
