"""A run whose teacher is corrected while each student learns: stages, report, verbs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paretron.artifacts.manifest import verify
from paretron.artifacts.models import load_model
from picorun import events, paretron, write_pico_recipe

ALONG = {"mode": "parallel", "tokens": 512, "lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and its run at `run`."""
    place = tmp_path_factory.mktemp("along")
    students = {"width": {"hidden": 48}, "depth": {"layers": 3}}
    recipe = write_pico_recipe(place, correct=ALONG, students=students, export=[], profile=None)
    done = paretron("run", recipe, "--out", place / "run", "--offline")
    assert done.returncode == 0, done.stderr
    return place


def loss(folder: Path, stage: str) -> float:
    found = json.loads((folder / "run/stages" / stage / "evaluation.json").read_text())
    return float(found["texts"]["validation"]["loss"])


def test_every_student_has_a_corrected_teacher_of_its_own(folder: Path) -> None:
    stages = folder / "run/stages"
    assert not (stages / "correct").exists()
    for name in ("width", "depth"):
        teacher = stages / f"{name}.distill/teacher"
        assert verify(teacher)["kind"] == "correct"
        assert load_model(teacher).config.hidden_size == 64
        curve = json.loads((stages / f"{name}.distill/metrics.json").read_text())["train"]
        assert sum("teacher_loss" in point for point in curve) == 4  # of six steps
    # The same windows in the same order make the same teacher, whoever learns from it.
    one, two = (
        verify(stages / f"{name}.distill/teacher")["files"]["model.safetensors"]
        for name in ("width", "depth")
    )
    assert one == two
    width, depth = (loss(folder, f"{name}.evaluate-teacher") for name in ("width", "depth"))
    assert width == depth != loss(folder, "teacher.evaluate-final")


def test_the_report_tells_of_it(folder: Path) -> None:
    report = json.loads((folder / "run/report/report.json").read_text())
    curves = {(c["model"], c["stage"], c["split"]): c for c in report["curves"]}
    assert len(curves["width", "correct", "train"]["values"]) == 4
    assert ("teacher", "correct", "train") not in curves
    (teacher, *_) = report["models"]
    assert teacher["loss"]["final"] == loss(folder, "teacher.evaluate-final")
    said = " ".join(report["captions"])
    assert "a copy of the teacher corrected along with it, on 512 tokens" in said
    ended = loss(folder, "depth.evaluate-teacher")
    assert f"to {ended:.3f} nats a token" in said


def test_it_is_reused_and_another_correction_is_not(folder: Path) -> None:
    again = paretron("run", folder / "recipe.yaml", "--out", folder / "run", "--offline")
    assert again.returncode == 0, again.stderr
    assert events(folder / "run")[-1]["stage"] == "report"
    other = paretron(
        "run", folder / "recipe.yaml", "--out", folder / "run", "--offline", "--set",
        "correct.lr=2e-3",
    )  # fmt: skip
    assert other.returncode == 2
    assert "settings.correct.lr" in other.stderr


def test_check_rehearses_it_to_its_end(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "kept"
    one = "students={width: {hidden: 48}}"
    done = paretron("check", folder / "recipe.yaml", "--out", out, "--json", "--set", one)
    assert done.returncode == 0, done.stderr
    assert "width.evaluate-teacher" in json.loads(done.stdout)["stages"]
    curve = json.loads((out / "stages/width.distill/metrics.json").read_text())["train"]
    assert ["teacher_loss" in point for point in curve] == [True, True, False]


def test_the_verbs_obey_it(folder: Path, tmp_path: Path) -> None:
    stages, recipe = folder / "run/stages", folder / "recipe.yaml"
    done = paretron(
        "distill", stages / "width.prune", "--teacher", folder / "teacher", "--recipe", recipe,
        "--out", tmp_path / "student", "-q",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in ("model.safetensors", "teacher/model.safetensors"):
        alone, of_run = (
            verify(place)["files"][name]
            for place in (tmp_path / "student", stages / "width.distill")
        )
        assert alone == of_run
    refused = paretron("correct", folder / "teacher", "--recipe", recipe, "--out", tmp_path / "no")
    assert refused.returncode == 2
    assert "correct.mode=serial" in refused.stderr
