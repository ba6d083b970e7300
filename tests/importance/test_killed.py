"""A scoring that is killed with SIGKILL goes on where it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from makers import PicoMaker
from paretron.artifacts.reader import Checkpoint
from paretron.importance.score import score_windows
from paretron.recipe import Score

TREE = Path(__file__).parents[2]
LAYERS = 8
KILLED_AFTER = 4  # values
SCORE = Score.model_validate({"micro_batch": 2, "depth": {"samples": 4}})

# A process that scores, slowly enough to be killed between two values.
PROGRAM = """
import sys, time
sys.path.insert(0, sys.argv[1])
from test_killed import scored
scored(sys.argv[2], sys.argv[3], pause_s=0.3)
"""


def scored(model: str, state: str, *, pause_s: float = 0.0) -> tuple[object, list[list[int]]]:
    """The losses of removal, and the removals that were computed for them, in order."""
    windows = list(torch.randint(0, 320, (4, 100), generator=torch.Generator().manual_seed(1)))
    computed: list[list[int]] = []

    def on_event(kind: str, fields: object) -> None:
        if kind == "removal":
            assert isinstance(fields, dict)
            computed.append(fields["without"])
            time.sleep(pause_s)

    scores = score_windows(
        Checkpoint.open(Path(model)), windows, score=SCORE, block_sizes=(3,),
        state=Path(state), on_event=on_event,
    )  # fmt: skip
    return scores.info.losses, computed


def test_killed_between_two_values(pico: PicoMaker, tmp_path: Path) -> None:
    model = str(pico(num_hidden_layers=LAYERS, max_position_embeddings=1024))
    whole, everything = scored(model, str(tmp_path / "whole"))
    roots = [TREE / r for r in ("toolkit", "tests")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, roots))}
    state = tmp_path / "state"
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), model, str(state)],
        env=environment,
    )
    journal = state / "depth.jsonl"
    deadline = time.monotonic() + 120
    while not journal.is_file() or len(journal.read_text().splitlines()) < 1 + KILLED_AFTER:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = [json.loads(line)["key"] for line in journal.read_text().splitlines()[1:]]
    with journal.open("a") as file:
        file.write('{"key": [9], "fig')  # what a line looks like that was cut
    resumed, computed = scored(model, str(state))
    assert KILLED_AFTER <= len(before) < len(everything)
    assert sorted(before + computed) == sorted(everything)
    assert resumed == whole


def test_another_config_is_another_model(pico: PicoMaker, tmp_path: Path) -> None:
    model = pico(num_hidden_layers=4, max_position_embeddings=1024)
    before, _ = scored(str(model), str(tmp_path / "state"))
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.5}))
    after, computed = scored(str(model), str(tmp_path / "state"))
    assert computed
    assert after != before
