"""The whole main job on a pico recipe: run, reuse, refuse, resume."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from paretron.artifacts.manifest import verify
from paretron.artifacts.models import load_model
from picorun import RECIPE, events, hashes, paretron, write_pico_recipe


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and its undisturbed run at `run`."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = write_pico_recipe(folder)
    done = paretron("run", recipe, "--out", folder / "run", "--offline")
    assert done.returncode == 0, done.stderr
    return folder


def copy_of(finished: Path, tmp_path: Path) -> Path:
    """A copy that a test may change; the recipe's paths are relative, so it is whole."""
    return Path(shutil.copytree(finished, tmp_path / "copy", symlinks=True))


def test_report_holds_what_was_made_and_measured(finished: Path) -> None:
    report = json.loads((finished / "run/report/report.json").read_text())
    assert report["schema"] == 1
    assert report["stamp"] is None
    models = {m["name"]: m for m in report["models"]}
    assert [m["kind"] for m in models.values()] == ["teacher", "width", "depth"]
    for name, model in models.items():
        weights = finished / "run/stages" / ("correct" if name == "teacher" else f"{name}.distill")
        loaded = load_model(weights)
        assert model["params"] == sum(p.numel() for p in loaded.parameters())
        assert math.isfinite(model["loss"]["final"])
        assert model["perplexity"]["validation"] == pytest.approx(math.exp(model["loss"]["final"]))
        # Every batch of the recipe, and the student's batch in the teacher's memory.
        assert {1, 2} <= {s["load"] for s in model["speed"]}
        assert all(s["engine"] == "ortgenai" and s["output_tok_s"] > 0 for s in model["speed"])
        assert all(s["repeats"] == 3 for s in model["speed"])
    for student in ("width", "depth"):
        assert models[student]["loss"]["pruned"] > models[student]["loss"]["final"]
        assert {a["to"] for a in models[student]["artifacts"]} == {"hf", "onnx"}
        assert all(c["passed"] for a in models[student]["artifacts"] for c in a["checks"])
    rules = {(s["model"], s["rule"]) for s in report["speedup"]}
    assert {(m, r) for m in ("width", "depth") for r in ("same_batch", "same_memory")} <= rules
    curves = {(c["model"], c["stage"], c["split"]) for c in report["curves"]}
    assert {("teacher", "correct", "train"), ("width", "distill", "validation")} <= curves


def test_every_artifact_verifies_and_events_tell(finished: Path) -> None:
    run = finished / "run"
    for stage in sorted((run / "stages").iterdir()):
        verify(stage)  # nothing else lies among them
    assert paretron("verify", run).returncode == 0
    steps = [e for e in events(run) if e["stage"] == "width.distill" and e["kind"] == "step"]
    assert len(steps) == RECIPE["distill"]["tokens"] // (32 * RECIPE["distill"]["global_batch"])
    assert all({"loss", "tokens_per_s", "eta_s"} <= set(e) for e in steps)


def test_inputs_are_untouched_and_nothing_is_left_over(finished: Path) -> None:
    run = finished / "run"
    assert not [p for p in run.rglob(".*") if "staging" in p.name]
    assert not any((run / "state").glob("*"))
    assert sorted(p.name for p in (finished / "teacher").iterdir() if p.name.startswith(".")) == []


def test_running_again_reuses_every_stage(finished: Path, tmp_path: Path) -> None:
    copy = copy_of(finished, tmp_path)
    before = hashes(copy / "run")
    logged = len(events(copy / "run"))
    done = paretron("run", finished / "recipe.yaml", "--out", copy / "run", "--offline")
    assert done.returncode == 0, done.stderr
    new = events(copy / "run")[logged:]
    # What is left out of the teacher and where it lies are said every time; nothing is made.
    assert {e["kind"] for e in new} - {"notice", "given"} == {"reused"}
    assert hashes(copy / "run") == before


def test_a_changed_recipe_is_refused_by_field_and_overwrite_makes_it_again(
    finished: Path, tmp_path: Path
) -> None:
    copy = copy_of(finished, tmp_path)
    before = hashes(copy / "run")
    command = ("run", finished / "recipe.yaml", "--out", copy / "run", "--set", "distill.lr=2e-3")
    refused = paretron(*command)
    assert refused.returncode == 2
    assert "settings.training.lr: 0.001 -> 0.002" in refused.stderr
    assert "--overwrite" in refused.stderr
    assert hashes(copy / "run") == before
    logged = len(events(copy / "run"))
    assert paretron(*command, "--overwrite").returncode == 0
    kinds = {e["stage"]: e["kind"] for e in events(copy / "run")[logged:]}
    assert kinds["score"] == kinds["width.prune"] == "reused"
    assert kinds["width.distill"] == "finished"
    assert hashes(copy / "run") != before


def test_a_changed_text_is_refused(finished: Path, tmp_path: Path) -> None:
    copy = copy_of(finished, tmp_path)
    shutil.rmtree(copy / "run")
    recipe = copy / "recipe.yaml"
    short = ("--set", "profile=null", "--set", "export=[{to: hf}]", "--out", copy / "run")
    assert paretron("run", recipe, *short).returncode == 0
    with (copy / "train.txt").open("a") as f:
        f.write("one more line\n")
    refused = paretron("run", recipe, *short)
    assert refused.returncode == 2
    assert "content" in refused.stderr


def test_more_to_train_on_is_another_text(finished: Path, tmp_path: Path) -> None:
    """How much text is kept follows from the training where the recipe does not say."""
    copy = copy_of(finished, tmp_path)
    refused = paretron(
        "run", finished / "recipe.yaml", "--out", copy / "run", "--set", "distill.tokens=1024"
    )
    assert refused.returncode == 2
    assert "settings.tokens.train: 768 -> 1024" in refused.stderr
    # Every stage that another recipe made is named before any work is done.
    assert "stages/width.distill" in refused.stderr
    assert "stages/depth.distill" in refused.stderr


def test_a_section_added_later_makes_the_report_again(finished: Path, tmp_path: Path) -> None:
    copy = copy_of(finished, tmp_path)
    shutil.rmtree(copy / "run/stages/profile")
    command = ("run", finished / "recipe.yaml", "--out", copy / "run")
    assert paretron(*command, "--set", "profile=null").returncode == 0
    without = json.loads((copy / "run/report/report.json").read_text())
    assert without["speedup"] == []
    assert paretron(*command).returncode == 0
    assert json.loads((copy / "run/report/report.json").read_text())["speedup"]


def test_out_inside_the_teacher_is_refused_before_anything_is_written(
    finished: Path, tmp_path: Path
) -> None:
    copy = copy_of(finished, tmp_path)
    before = sorted(p.name for p in (copy / "teacher").iterdir())
    done = paretron("run", copy / "recipe.yaml", "--out", copy / "teacher" / "run")
    assert done.returncode == 2
    assert sorted(p.name for p in (copy / "teacher").iterdir()) == before


def test_a_rehearsal_never_replaces_a_run(finished: Path) -> None:
    before = hashes(finished / "run")
    done = paretron("check", finished / "recipe.yaml", "--out", finished / "run")
    assert done.returncode == 2
    assert "already exists" in done.stderr
    assert hashes(finished / "run") == before


def start(recipe: Path, out: Path, *more: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "paretron", "run", str(recipe), "--out", str(out), "-q", *more],
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def test_killed_at_ten_random_moments_ends_with_the_same_bytes(
    finished: Path, tmp_path: Path
) -> None:
    generator = random.Random(1)
    out = tmp_path / "run"
    quiet = ("--set", "profile=null", "--set", "export=[{to: hf}]")
    killed_in = []
    for _ in range(10):
        logged = len(events(out)) if (out / "events.jsonl").is_file() else 0
        process = start(finished / "recipe.yaml", out, *quiet)
        # Moments are counted in events, not seconds: most of a second is imports.
        wanted = logged + generator.randrange(1, 30)
        while process.poll() is None and (
            not (out / "events.jsonl").is_file() or len(events(out)) < wanted
        ):
            time.sleep(0.01)
        time.sleep(generator.random() * 0.2)
        process.kill()
        process.wait()
        killed_in.append(events(out)[-1]["stage"])
        for stage in (out / "stages").glob("[!.]*"):
            verify(stage)  # absent or complete
    assert len(set(killed_in)) > 1, killed_in
    done = paretron("run", finished / "recipe.yaml", "--out", out, *quiet)
    assert done.returncode == 0, done.stderr
    assert hashes(out) == hashes(finished / "run")


def test_sigterm_exits_75_and_the_same_command_continues(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = (
        "distill.tokens=12288", "distill.checkpoint_every=40", "profile=null", "export=[{to: hf}]"
    )  # fmt: skip
    longer = tuple(part for setting in settings for part in ("--set", setting))
    process = start(finished / "recipe.yaml", out, *longer)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        log = out / "events.jsonl"
        if log.is_file() and '"stage": "width.distill", "kind": "step"' in log.read_text():
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr.decode()
    assert "same command" in stderr.decode()
    steps_before = [e["step"] for e in events(out) if e["kind"] == "step"
                    and e["stage"] == "width.distill"]  # fmt: skip
    done = paretron("run", finished / "recipe.yaml", "--out", out, *longer)
    assert done.returncode == 0, done.stderr
    steps = [e["step"] for e in events(out) if e["kind"] == "step"
             and e["stage"] == "width.distill"]  # fmt: skip
    # One step after another: what was done before the signal is not done again.
    assert steps == sorted(set(steps))
    assert len(steps) > len(steps_before)


def test_two_processes_with_one_out(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = start(finished / "recipe.yaml", out)
    while not (out / ".lock").is_file():
        time.sleep(0.02)
    time.sleep(0.2)
    second = paretron("run", finished / "recipe.yaml", "--out", out)
    assert second.returncode == 4
    assert str(first.pid) in second.stderr
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
