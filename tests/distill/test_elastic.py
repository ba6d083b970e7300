"""A process of a training is killed: torchrun starts all of them again, and they go on."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from paretron.artifacts.manifest import verify
from pico import make_pico
from picorun import RECIPE, write_pico_recipe

STEPS = 60
TOKENS = STEPS * 4 * 32  # batches of 4 windows of 32 tokens


def test_torchrun_starts_again_from_the_last_checkpoint(tmp_path: Path) -> None:
    distill = RECIPE["distill"] | {"tokens": TOKENS, "checkpoint_every": 4, "eval_every": STEPS}
    recipe = write_pico_recipe(tmp_path, distill=distill)
    student = make_pico(tmp_path / "student", num_hidden_layers=2)
    out, log = tmp_path / "out", tmp_path / "log"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = int(s.getsockname()[1])
    with log.open("w") as file:
        torchrun = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
             "--max-restarts", "1", "--master-port", str(port), "-m", "paretron", "distill",
             str(student), "--teacher", str(tmp_path / "teacher"), "--recipe", str(recipe),
             "--out", str(out)],
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        kill_one(torchrun, tmp_path / ".out.state")
        assert torchrun.wait(400) == 0, log.read_text()[-4000:]
    finally:
        if torchrun.poll() is None:
            os.killpg(torchrun.pid, signal.SIGKILL)
    said = re.findall(rf"resumed after step (\d+) of {STEPS}", log.read_text())
    assert len(said) == 1, log.read_text()[-4000:]
    assert int(said[0]) >= 4
    verify(out)


def kill_one(torchrun: subprocess.Popen[bytes], state: Path) -> None:
    """Wait for a checkpoint, then end the process that does not lead without a word."""
    until = time.monotonic() + 300
    while not list(state.glob("step-*")):
        assert torchrun.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    (mate,) = (pid for pid in children(torchrun.pid) if environment(pid).get("RANK") == "1")
    os.kill(mate, signal.SIGKILL)


def children(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def environment(pid: int) -> dict[str, str]:
    text = Path(f"/proc/{pid}/environ").read_text()
    return dict(line.split("=", 1) for line in text.split("\0") if "=" in line)
