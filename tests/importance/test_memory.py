"""A checkpoint of three times the allowed memory, scored layer by layer in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from makers import PicoMaker
from paretron.artifacts.reader import Checkpoint
from paretron.importance.score import score_windows
from paretron.importance.scores import Scores
from paretron.recipe import Score

TREE = Path(__file__).parents[2]
SHAPE = {"num_hidden_layers": 24, "intermediate_size": 1024, "hidden_size": 256}

# RLIMIT_DATA counts what a process allocates for itself, not the files that it maps: the limit is
# set once the libraries are there, at a third of the weights.
PROGRAM = """
import json, resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_memory import windows
from paretron.artifacts.reader import Checkpoint
from paretron.importance.score import score_windows
from paretron.recipe import Score

model, out, limit, placement = Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
torch.randn(64, 64) @ torch.randn(64, 64)
used = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + limit, used + limit))
events = []
scores = score_windows(
    Checkpoint.open(model), windows(), score=Score(micro_batch=1, placement=placement),
    on_event=lambda kind, fields: events.append((kind, dict(fields))),
)
scores.save(out)
print(json.dumps(events[0][1]["message"]))
"""


def windows() -> list[torch.Tensor]:
    return list(torch.randint(0, 320, (4, 16), generator=torch.Generator().manual_seed(1)))


def test_a_third_of_the_weights_is_enough(pico: PicoMaker, tmp_path: Path) -> None:
    model = pico(**SHAPE)
    checkpoint = Checkpoint.open(model)

    def score(placement: str) -> subprocess.CompletedProcess[str]:
        out = tmp_path / placement
        out.mkdir()
        roots = [TREE / r for r in ("toolkit", "tests")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, roots))}
        command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), str(model),
                   str(out), str(checkpoint.nbytes // 3), placement]  # fmt: skip
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert score("resident").returncode != 0  # else the limit limits nothing
    done = score("streamed")
    assert done.returncode == 0, done.stderr
    assert "layer by layer" in json.loads(done.stdout.splitlines()[-1])
    found = Scores.load(tmp_path / "streamed")
    whole = score_windows(checkpoint, windows(), score=Score(micro_batch=1, placement="resident"))
    for axis, statistics in whole.statistics.items():
        torch.testing.assert_close(found.statistics[axis].sums, statistics.sums, rtol=1e-6, atol=0)
