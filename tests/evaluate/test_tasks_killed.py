"""An evaluation that is killed half-way goes on with the tasks that it had not asked."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from paretron.artifacts.manifest import Provenance, verify
from paretron.evaluate.stage import evaluate_model
from paretron.recipe import Evaluate
from picotask import sentences, write_task

pytest.importorskip("lm_eval", reason="lm-eval is an extra")

NAMES = ("one", "two", "three", "four")


@pytest.fixture
def tasks(tmp_path: Path) -> list[Path]:
    """Tasks that take a while, each with documents of its own."""
    pairs = [*sentences(held_out=True), *sentences(held_out=False)]
    made = []
    for k, name in enumerate(NAMES):
        lines = [
            json.dumps({"choices": [f"{'so ' * (n % (k + 2))}{s}" for s in pair], "gold": 0})
            for n, pair in enumerate(pairs)
        ]
        made.append(write_task(tmp_path, name, lines))
    return made


def command(model: Path, tasks: list[Path], out: Path) -> list[str]:
    return [
        sys.executable, "-m", "paretron", "eval", str(model), "--tasks",
        ",".join(map(str, tasks)), "--out", str(out), "--offline",
    ]  # fmt: skip


def lines_of(journal: Path) -> list[dict[str, Any]]:
    """The tasks that a journal holds whole."""
    if not journal.is_file():
        return []
    lines = [
        line for line in journal.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")
    ]
    return [found for found in map(json.loads, lines) if found.get("key", [""])[0] == "task"]


def test_only_the_missing_tasks_run_again(
    learned: Path, own_cache: Path, tasks: list[Path], tmp_path: Path
) -> None:
    asked = command(learned, tasks, tmp_path / "out")
    journal = tmp_path / ".out.state/tasks.jsonl"
    process = subprocess.Popen(
        asked, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while len(lines_of(journal)) < 2:
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = [line["key"][1] for line in lines_of(journal)]
    assert not (tmp_path / "out").exists()
    assert kept == list(NAMES[: len(kept)])
    assert 2 <= len(kept) < len(NAMES)
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = re.findall(r"^eval: (\w+) acc [\d.]+(, from before)?$", done.stderr, re.MULTILINE)
    assert [name for name, _ in told] == list(NAMES)
    assert [name for name, again in told if again] == kept
    verify(tmp_path / "out")
    assert not journal.parent.exists()
    # What was killed and went on found what an evaluation in one go finds.
    evaluate_model(
        learned, {}, out=tmp_path / "whole", provenance=Provenance("evaluation"),
        settings=Evaluate.model_validate({"perplexity": [], "tasks": list(map(str, tasks))}),
        on_event=lambda kind, fields: None,
    )  # fmt: skip
    for name in ("evaluation.json", *(f"samples/{task}.jsonl" for task in NAMES)):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
