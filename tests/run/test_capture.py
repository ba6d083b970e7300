"""A teacher asked once in a run, for every student, and by the verb."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paretron.artifacts.manifest import verify
from paretron.errors import ParetronError
from paretron.recipe import Distill
from picorun import RECIPE, events, paretron, write_pico_recipe

OFFLINE = {"offline": "top_k", "loss": {"top_k": 64}}
SMALL: dict[str, Any] = {"correct": None, "profile": None, "export": [{"to": "hf"}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with two students of an offline teacher, and its run."""
    made = tmp_path_factory.mktemp("offline")
    students = {"width": {"hidden": 48, "ffn": 64}, "narrow": {"ffn": 64}}
    recipe = write_pico_recipe(
        made, students=students, distill=RECIPE["distill"] | OFFLINE, **SMALL
    )
    done = paretron("run", recipe, "--out", made / "run", "--offline")
    assert done.returncode == 0, done.stderr
    return made


def test_one_capture_serves_every_student(folder: Path) -> None:
    run = folder / "run"
    assert sorted(p.name for p in (run / "stages").iterdir() if "capture" in p.name) == ["capture"]
    identity = verify(run / "stages/capture")["self_sha256"]
    for student in ("width", "narrow"):
        assert verify(run / f"stages/{student}.distill")["parents"]["teacher"] == identity
    assert {e["kind"] for e in events(run) if e["stage"] == "capture"} >= {"started", "finished"}
    assert not any((run / "state").glob("*"))


def test_plan_states_what_it_costs(folder: Path) -> None:
    def estimates(*more: str) -> dict[str, Any]:
        done = paretron("plan", folder / "recipe.yaml", "--json", "--offline", *more)
        return {stage["name"]: stage for stage in json.loads(done.stdout)["stages"]}

    found = estimates()
    header = json.loads((folder / "run/stages/capture/capture.json").read_text())
    assert header["num_windows"] == 768 // 32
    written = (folder / "run/stages/capture/windows-00000.bin").stat().st_size
    assert found["capture"]["disk_bytes"] == written
    assert found["capture"]["flops"] > 0
    live = estimates("--set", "distill.offline=null")
    assert "capture" not in live
    assert live["width.distill"]["flops"] > found["width.distill"]["flops"]
    hidden = estimates("--set", "distill.offline=hidden")
    vocab = header["vocab_size"]
    assert hidden["capture"]["disk_bytes"] == 4 * 64 * (768 + vocab)


def test_the_verb_captures_and_trains_from_it(folder: Path, tmp_path: Path) -> None:
    recipe, kept = folder / "recipe.yaml", tmp_path / "kept"
    done = paretron(
        "distill", "--capture", "--teacher", folder / "teacher", "--recipe", recipe, "--out", kept
    )
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept"]
    # The same text of the same teacher, as the run has it.
    of_run = folder / "run/stages/capture"
    for name in ("capture.json", "windows-00000.bin"):
        assert (kept / name).read_bytes() == (of_run / name).read_bytes()
    student = folder / "run/stages/width.prune"
    done = paretron(
        "distill", student, "--teacher", kept, "--recipe", recipe, "--out", tmp_path / "trained"
    )
    assert done.returncode == 0, done.stderr
    mine, its = (
        json.loads((place / "metrics.json").read_text())["train"]
        for place in (tmp_path / "trained", folder / "run/stages/width.distill")
    )
    assert [s["loss"] for s in mine] == [s["loss"] for s in its]


def test_a_student_and_capture_exclude_each_other(folder: Path, tmp_path: Path) -> None:
    common = ("--teacher", folder / "teacher", "--recipe", folder / "recipe.yaml", "--out",
              tmp_path / "x")  # fmt: skip
    for more in ((), ("--capture", folder / "teacher")):
        done = paretron("distill", *more, *common)
        assert done.returncode == 2
        assert "STUDENT" in done.stderr


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"offline": "top_k"}, "top_k in loss, as 64"),
        ({"offline": "top_k", "loss": {"logits": "jsd"}}, "offline: hidden"),
        ({"offline": "hidden", "loss": {"states": {"embedding": True}}}, "not captured"),
        ({"offline": "hidden", "loss": {"logits": "none", "labels": 1.0}}, "asks the teacher"),
        (
            {"offline": "hidden", "global_batch": 1,
             "phases": [{"seq_len": 8, "tokens": 80}, {"seq_len": 16, "tokens": 80}]},
            "one seq_len",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_learned_offline_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises((ParetronError, ValueError), match=said):
        Distill(**{"tokens": 160} | settings)


def test_check_rehearses_the_capture(folder: Path) -> None:
    done = paretron("check", folder / "recipe.yaml", "--offline")
    assert done.returncode == 0, done.stderr
    assert "capture" in done.stdout + done.stderr
