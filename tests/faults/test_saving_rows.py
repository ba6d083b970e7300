"""Group S: saving, crashing, two at once. Whatever happens, `--out` is absent or whole."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from faults.conftest import Refused, fingerprint
from faults.pruner import Pruner
from paretron.artifacts.manifest import MANIFEST, read_manifest, verify
from paretron.errors import Code

KILLS = 200

pytestmark = pytest.mark.usefixtures("to_prune")


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
        pruner.start(out, kill_after_s=moments.uniform(0, longest_s))
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
    for number in range(1, KILLS // 10):
        current = shown(out)
        after_s = moments.uniform(0, longest_s)
        pruner.start(out, name=str(number), overwrite=True, kill_after_s=after_s)
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


def test_s7_of_two_one_wins(pruners: tuple[Pruner, Pruner], tmp_path: Path) -> None:
    out = tmp_path / "out"
    pids = [p.start(out, name=str(k), pause_s=0.1) for k, p in enumerate(pruners)]
    codes = [p.end() for p in pruners]
    assert sorted(codes) == [0, Code.LOCKED.exit]
    winner, loser = codes.index(0), codes.index(Code.LOCKED.exit)
    assert shown(out) == str(winner)
    said = pruners[loser].message()
    assert f'"pid": {pids[winner]}' in said
    assert '"host"' in said


def test_s7_the_lock_dies_with_its_holder(pruner: Pruner, tmp_path: Path) -> None:
    pruner.start(tmp_path / "out", pause_s=60, kill_after_s=1.0)
    assert pruner.end() == -signal.SIGKILL
    assert list(tmp_path.glob(".*.staging"))
    pruner.start(tmp_path / "out")
    assert pruner.end() == 0
    assert not list(tmp_path.glob(".*.staging"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_s2_a_stop_of_a_single_verb(number: signal.Signals, tmp_path: Path) -> None:
    """Stopped while it writes: 75, and nothing half-made stays."""
    done = subprocess.run(
        [sys.executable, "-c", _STOPPED, str(number.value), tmp_path / "model", "--scores",
         tmp_path / "scores", "--ffn", "64", "--out", tmp_path / "out", "-q"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 75, done.stderr
    assert "error: stopped on request" in done.stderr
    assert "  fix: " in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "scores"]


_STOPPED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
from paretron.artifacts.writer import TensorWriter
from paretron.cli.main import main
finish = TensorWriter._finish
def stopped(self):
    os.kill(os.getpid(), int(sys.argv[1]))
    finish(self)
TensorWriter._finish = stopped
main(["prune", *sys.argv[2:]])
"""


CHANGES = ("byte", "longer", "removed")


def test_s9_any_change_of_any_file(pruner: Pruner, refused: Refused, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pruner.start(out)
    assert pruner.end() == 0
    assert len(files(out)) > 5
    for number, name in enumerate(files(out)):
        content = (out / name).read_bytes()
        for change in CHANGES if number < 2 else CHANGES[:1]:
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


def test_s12_the_same_bytes_anywhere(pruner: Pruner, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    tokyo = {"TZ": "Asia/Tokyo", "LC_ALL": "C"}
    lima = {"TZ": "America/Lima", "LC_ALL": "C.UTF-8"}
    pruner.start(tmp_path / "out", environment=tokyo, folder=str(tmp_path), threads=1)
    assert pruner.end() == 0
    elsewhere = str(tmp_path / "elsewhere")
    pruner.start(tmp_path / "again", environment=lima, folder=elsewhere, threads=2)
    assert pruner.end() == 0
    first, again = (fingerprint([tmp_path / name]) for name in ("out", "again"))
    assert [*first.values()] == [*again.values()]
