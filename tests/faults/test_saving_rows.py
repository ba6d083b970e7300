"""Group S: saving, crashing, two at once. Whatever happens, `--out` is absent or whole."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from faults.conftest import Refused, fingerprint
from makers import PicoMaker
from paretron.artifacts.manifest import MANIFEST, read_manifest, verify
from paretron.artifacts.reader import Checkpoint
from paretron.errors import Code
from picoscores import random_scores

WORKER = Path(__file__).with_name("pruning_worker.py")
KILLS = 40


class Pruner:
    """Prunes one model in processes that can be killed."""

    def __init__(self, model: Path, scores: Path) -> None:
        self.inputs = {"model": str(model), "scores": str(scores)}
        self._process = subprocess.Popen(
            [sys.executable, WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def start(self, out: Path, **job: Any) -> int:
        """Begin, and return the process id."""
        assert self._process.stdin is not None
        self._process.stdin.write(
            json.dumps(self.inputs | {"out": str(out), "name": "new"} | job) + "\n"
        )
        self._process.stdin.flush()
        return int(self._line())

    def end(self) -> int:
        """Wait, and return the exit code."""
        return int(self._line())

    def message(self) -> str:
        """What the last failed one said."""
        assert self._process.stderr is not None
        return str(json.loads(self._process.stderr.readline()))

    def close(self) -> None:
        """End the worker."""
        self._process.communicate(timeout=60)


@pytest.fixture
def inputs(pico: PicoMaker, tmp_path: Path) -> tuple[Path, Path]:
    model, scores = pico(), tmp_path / "scores"
    scores.mkdir()
    random_scores(Checkpoint.open(model)).save(scores)
    return model, scores


@pytest.fixture
def pruner(inputs: tuple[Path, Path]) -> Iterator[Pruner]:
    made = Pruner(*inputs)
    yield made
    made.close()


def shown(out: Path) -> str | None:
    """Which artifact is there, verified; None when there is none."""
    return verify(out)["settings"]["name"] if out.exists() else None


def files(out: Path) -> dict[str, Any]:
    listed: dict[str, Any] = read_manifest(out)["files"]
    return listed


def test_s1_kill_9_while_a_student_is_saved(pruner: Pruner, tmp_path: Path) -> None:
    start = time.monotonic()
    pruner.start(tmp_path / "undisturbed")
    assert pruner.end() == 0
    longest_s = 1.2 * (time.monotonic() - start)
    out, moments = tmp_path / "out", random.Random(1)
    before, codes, seen = fingerprint([tmp_path / "model"]), set(), set()
    for _ in range(KILLS):
        pid = pruner.start(out)
        time.sleep(moments.uniform(0, longest_s))
        os.kill(pid, signal.SIGKILL)
        codes.add(pruner.end())
        seen.add(shown(out))
        shutil.rmtree(out, ignore_errors=True)
    assert -signal.SIGKILL in codes
    assert None in seen
    assert fingerprint([tmp_path / "model"]) == before
    pruner.start(out)
    assert pruner.end() == 0
    assert files(out) == files(tmp_path / "undisturbed")
    assert not list(tmp_path.glob(".*.staging"))


def test_s6_kill_9_while_one_replaces_another(pruner: Pruner, tmp_path: Path) -> None:
    out, moments = tmp_path / "out", random.Random(6)
    start = time.monotonic()
    pruner.start(out, name="0")
    assert pruner.end() == 0
    longest_s = 1.2 * (time.monotonic() - start)
    for number in range(1, KILLS // 2):
        current = shown(out)
        pid = pruner.start(out, name=str(number), overwrite=True)
        time.sleep(moments.uniform(0, longest_s))
        os.kill(pid, signal.SIGKILL)
        pruner.end()
        assert shown(out) in (current, str(number))


def test_s6_a_target_that_exists(pruner: Pruner, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name, overwrite, code, then in (
        ("old", False, 0, "old"), ("new", False, 2, "old"), ("new", True, 0, "new"),
    ):  # fmt: skip
        pruner.start(out, name=name, overwrite=overwrite)
        assert (pruner.end(), shown(out)) == (code, then)
    assert "add --overwrite" in pruner.message()


@pytest.mark.parametrize("largest_file", [1, 1000, 50_000, 99_000])
def test_s3_no_space_left(largest_file: int, pruner: Pruner, tmp_path: Path) -> None:
    pruner.start(tmp_path / "out", largest_file=largest_file)
    assert pruner.end() == Code.DISK.exit
    said = pruner.message()
    assert "bytes free" in said
    assert "fix:" in said
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*.staging"))
    pruner.start(tmp_path / "out")
    assert pruner.end() == 0


def test_s7_of_two_one_wins(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    both = [Pruner(*inputs), Pruner(*inputs)]
    pids = [p.start(tmp_path / "out", name=str(k), pause_s=0.1) for k, p in enumerate(both)]
    codes = [p.end() for p in both]
    assert sorted(codes) == [0, Code.LOCKED.exit]
    winner, loser = codes.index(0), codes.index(Code.LOCKED.exit)
    assert shown(tmp_path / "out") == str(winner)
    said = both[loser].message()
    assert f'"pid": {pids[winner]}' in said
    assert '"host"' in said
    for pruner in both:
        pruner.close()


def test_s7_the_lock_dies_with_its_holder(pruner: Pruner, tmp_path: Path) -> None:
    pid = pruner.start(tmp_path / "out", pause_s=60)
    while not list(tmp_path.glob(".*.staging")):
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    pruner.end()
    pruner.start(tmp_path / "out")
    assert pruner.end() == 0


CHANGES = ("byte", "longer", "removed")


def test_s9_any_change_of_any_file(pruner: Pruner, refused: Refused, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pruner.start(out)
    assert pruner.end() == 0
    assert len(files(out)) > 5
    for name in files(out):
        content = (out / name).read_bytes()
        for change in CHANGES:
            if change == "byte":
                (out / name).write_bytes(bytes([content[0] ^ 1]) + content[1:])
            elif change == "longer":
                (out / name).write_bytes(content + b"\n")
            else:
                (out / name).unlink()
            refused("verify", out, code=Code.INPUT_MANIFEST, names=name)
            (out / name).write_bytes(content)
    (out / "added.txt").write_text("")
    refused("verify", out, code=Code.INPUT_MANIFEST, names="added.txt")
    (out / "added.txt").unlink()
    verify(out)
    manifest = json.loads((out / MANIFEST).read_text())
    (out / MANIFEST).write_text(json.dumps(manifest | {"seed": 7}))
    refused("verify", out, code=Code.INPUT_MANIFEST, names=MANIFEST)


def test_s12_the_same_bytes_anywhere(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    model, scores = inputs
    places = {
        "a": {"TZ": "Asia/Tokyo", "LC_ALL": "C", "OMP_NUM_THREADS": "1"},
        "b": {"TZ": "America/Lima", "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "2"},
    }
    made = []
    for name, environment in places.items():
        (tmp_path / name).mkdir()
        out = tmp_path / name / "out"
        subprocess.run(
            [sys.executable, "-m", "paretron", "prune", os.path.relpath(model, tmp_path / name),
             "--scores", scores, "--hidden", "48", "--layers", "3", "--out", "out", "-q"],
            cwd=tmp_path / name, env=os.environ | environment, check=True, capture_output=True,
        )  # fmt: skip
        made.append({k.replace(f"/{name}/", "/"): v for k, v in fingerprint([out]).items()})
    assert made[0] == made[1]
