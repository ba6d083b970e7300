"""The trial of a correction on a pico recipe: a useful one goes on, a harmful one does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from makers import PicoMaker
from paretron.artifacts.copying import copy_checkpoint
from paretron.artifacts.manifest import read_manifest, sha256_file
from paretron.artifacts.models import load_model, save_model
from paretron.artifacts.reader import INDEX, Checkpoint
from paretron.cli.main import _run
from paretron.errors import Code, ParetronError
from paretron.plan.plan import make_plan
from paretron.plan.stages import token_limits
from paretron.recipe import load_recipe
from pico import make_pico
from picorun import RECIPE, teach, write_pico_recipe

WEIGHTS = "model.safetensors"
CORRECT = RECIPE["correct"] | {"tokens": 4096, "trial": {"tokens": 1024}}
STUDENTS = {"width": {"hidden": 48, "ffn": 64}}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose teacher knows so little of the text that a correction can help."""
    folder = tmp_path_factory.mktemp("trial")
    path = write_pico_recipe(
        folder, correct=CORRECT, students=STUDENTS, profile=None, export=[{"to": "hf"}]
    )
    shutil.rmtree(folder / "teacher")
    teach(make_pico(folder / "teacher", "llama"), (folder / "train.txt").read_text(), steps=15)
    return path


@pytest.mark.parametrize(
    ("lr", "goes_on"), [("1e-3", "corrected"), ("0.9", "uncorrected")], ids=["useful", "absurd"]
)
def test_the_teacher_that_teaches_better_goes_on(
    recipe: Path, tmp_path: Path, lr: str, goes_on: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = ["run", str(recipe), "--out", str(out), "--offline", "--set", f"correct.lr={lr}"]
    assert _run(command) == 0
    stages = out / "stages"
    decision = json.loads((stages / "decide/decision.json").read_text())
    found = {
        which: json.loads((stages / f"trial.{which}/trial.json").read_text())
        for which in ("without", "with")
    }
    assert decision["goes_on"] == goes_on
    assert (decision["student"], decision["tokens"]) == ("width", 1024)
    assert decision["loss_with"] == found["with"]["loss"]
    assert decision["loss_without"] == found["without"]["loss"]
    assert decision["difference"] == found["with"]["loss"] - found["without"]["loss"]
    assert (decision["difference"] < 0) == (goes_on == "corrected")
    # The decided teacher is the one that all later stages ask, prune and judge.
    came = {"corrected": stages / "correct", "uncorrected": recipe.parent / "teacher"}[goes_on]
    assert sha256_file(stages / "decide" / WEIGHTS) == sha256_file(came / WEIGHTS)
    decided = read_manifest(stages / "decide")["self_sha256"]
    for stage, role in (
        ("score", "model"), ("width.prune", "model"), ("width.distill", "teacher"),
        ("teacher.evaluate-final", "model"),
    ):  # fmt: skip
        assert read_manifest(stages / stage)["parents"][role] == decided
    # One sentence says so, and the captions claim no correction that did not go on.
    report = json.loads((out / "report/report.json").read_text())
    (said,) = [c for c in report["captions"] if c.startswith("Trial of the correction")]
    assert f"{decision['loss_without']:.4f}" in said
    assert f"the {goes_on} teacher went on" in said
    assert said in (out / "report/report.html").read_text()
    claimed = any("the teacher corrected on" in caption for caption in report["captions"])
    assert claimed == (goes_on == "corrected")
    assert _run(command) == 0
    assert "decide: reused" in capsys.readouterr().err


def test_a_trial_is_planned_and_counted(recipe: Path) -> None:
    loaded = load_recipe(recipe)
    plan = make_plan(loaded, out=recipe.parent / "planned", offline=True)
    assert not plan.problems
    names = [stage.name for stage in plan.stages]
    trial = ["trial.score", "trial.prune", "trial.without", "trial.with", "decide"]
    assert names[names.index("correct") + 1 :][:6] == [*trial, "score"]
    by_name = {stage.name: stage for stage in plan.stages}
    without, with_ = by_name["trial.without"], by_name["trial.with"]
    assert dict(without.settings) == dict(with_.settings)
    assert dict(without.inputs) | {"teacher": "correct"} == dict(with_.inputs)
    # A longer trial costs in proportion, asks for its text, and leaves the correction as it was.
    longer = load_recipe(recipe, overrides=["correct.trial.tokens=8192"])
    other = make_plan(longer, out=recipe.parent / "planned", offline=True)
    assert other.estimates["trial.with"].flops == 8 * plan.estimates["trial.with"].flops
    assert plan.estimates["decide"].disk_bytes == plan.teacher.weight_bytes
    assert token_limits(longer)["train"] == 8192
    assert by_name["correct"] in other.stages
    too_short = load_recipe(recipe, overrides=["correct.trial.tokens=100"])
    (problem,) = make_plan(too_short, out=recipe.parent / "planned", offline=True).problems
    assert (problem.code, problem.where) == (Code.RECIPE_VALUE, "correct.trial.tokens")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["correct.trial.student=other"], "other is no student of a stated shape: width"),
        (["students={trial: {layers: 2}}"], "cannot be named trial"),
        (["distill.loss={logits: none, labels: 1.0}"], "asks none"),
    ],
    ids=["unknown", "name", "retraining"],
)
def test_a_trial_that_cannot_be_is_refused(recipe: Path, changes: list[str], said: str) -> None:
    with pytest.raises(ParetronError, match=said):
        load_recipe(recipe, overrides=changes)


def test_a_rehearsal_tries_too(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["check", str(recipe), "--offline", "--json"]) == 0
    assert {"trial.with", "decide"} <= set(json.loads(capsys.readouterr().out)["stages"])


def test_a_copied_checkpoint_has_its_source_s_weights(pico: PicoMaker, tmp_path: Path) -> None:
    model = pico()
    source, copy = tmp_path / "source", tmp_path / "copy"
    for folder in (source, copy):
        folder.mkdir()
    config = Checkpoint.open(model).config
    save_model(load_model(model), source, config=config, companions=model, max_shard_bytes=300_000)
    copy_checkpoint(source, copy)
    files = [p.name for p in source.glob("*.safetensors")]
    assert len(files) > 1
    assert {p.name for p in copy.iterdir()} == {p.name for p in source.iterdir()}
    for name in (*files, INDEX):
        assert (copy / name).read_bytes() == (source / name).read_bytes()
        assert (copy / name).stat().st_nlink == 1  # a link would be refused, and can change
