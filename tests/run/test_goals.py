"""A run's goals: judged in its report, printed at its end, and required when asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paretron.cli.main import main
from picorun import RECIPE, events, write_pico_recipe

GOALS = {
    "params": "<= 0.9x",
    "loss.validation": "<= +9",
    "perplexity.validation": "<= 0.1x",
    "output_tok_s": ">= 1000x",
    "ttft_ms": "<= 1e6",
    "prefill_tok_s@same_memory": ">= 1",
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    profile = {"engines": [{"name": "transformers"}], "lengths": [[8, 4]], "repeats": 3}
    return write_pico_recipe(
        tmp_path_factory.mktemp("goals"),
        correct=None,
        students={"width": RECIPE["students"]["width"]},
        distill=RECIPE["distill"] | {"tokens": 128},
        export=[{"to": "hf"}],
        profile=profile,
        goals=GOALS,
    )


def called(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    return int(ended.value.code or 0)


def verdicts(run: Path) -> dict[str, dict[str, Any]]:
    report = json.loads((run / "report/report.json").read_text())
    return {goal["figure"]: goal for goal in report["goals"]}


def test_goals_of_a_run(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = recipe.parent / "run"
    command = ("run", recipe, "--out", run, "--offline", "--quiet")
    assert called(*command, "--require-goals") == 5
    said = capsys.readouterr().err
    found = verdicts(run)  # the report is there all the same
    assert {figure: goal["verdict"] for figure, goal in found.items()} == {
        "params": "met", "loss.validation": "met", "perplexity.validation": "missed",
        "output_tok_s": "missed", "ttft_ms": "met", "prefill_tok_s@same_memory": "met",
    }  # fmt: skip
    assert found["params"]["value"] < 0.9
    assert "transformers, 1 requests sent at once, 8 + 4 tokens" in found["output_tok_s"]["text"]
    assert "taken in pairs" in found["loss.validation"]["text"]
    for figure in ("perplexity.validation", "output_tok_s"):
        assert f"error: {run}/report/report.html: width: {figure} at " in said
    assert "params" not in said

    before = len(events(run))
    assert called(*command) == 0
    assert {e["kind"] for e in events(run)[before:]} <= {"reused", "given", "notice"}
    said = capsys.readouterr().out
    assert said.count("goal: width: ") == len(GOALS)
    assert "goal: width: params at most 0.9 times the teacher's: met, " in said

    assert called("report", run, "--require-goals") == 5
    assert called("report", run) == 0

    before = len(events(run))
    capsys.readouterr()
    eased = "goals={params: '<= 0.9x'}"
    assert called(*command, "--require-goals", "--json", "--set", eased) == 0
    made = [e["stage"] for e in events(run)[before:] if e["kind"] == "started"]
    assert made == ["report"]
    (goal,) = json.loads(capsys.readouterr().out)["goals"]
    assert goal == verdicts(run)["params"]


def test_goals_are_required_of_a_recipe_that_has_some(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("run", recipe, "--out", tmp_path / "run", "--set", "goals={}")
    assert called(*command, "--require-goals") == 2
    assert "there is no goal to require" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
