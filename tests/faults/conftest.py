"""What must hold for every fault, whatever it is: the universal conditions U1 to U7."""

from __future__ import annotations

import hashlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest

from faults.pruner import Pruner
from makers import PicoMaker
from paretron.artifacts.reader import Checkpoint
from paretron.errors import Code
from picotraining import arguments, tokens

__all__ = ["arguments", "tokens"]  # the fixtures of trainings

CANARY = "hf_" + "Qx7" * 11  # a token that must not be seen anywhere
LONGEST_S = 60.0


@dataclass(frozen=True)
class Outcome:
    """How one command ended, and what it said."""

    code: int
    out: str
    err: str


Cli = Callable[..., Outcome]
Refused = Callable[..., Outcome]


def fingerprint(folders: Iterable[Path]) -> dict[str, str]:
    """The sha256 of every file below the folders, links not followed."""
    return {
        str(p): hashlib.sha256(p.read_bytes()).hexdigest()
        for folder in folders
        for p in sorted(folder.rglob("*"))
        if p.is_file() and not p.is_symlink()
    }


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    """Run the command line in this process: no network, a secret in the environment."""
    from paretron.cli.main import main

    def no_network(*args: Any, **kwargs: Any) -> NoReturn:
        pytest.fail(f"the network was asked for: {args[1:]}")

    def run(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        start = time.monotonic()
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr(socket.socket, "connect", no_network)
            patch.setattr(socket, "getaddrinfo", no_network)
            patch.setenv("HF_TOKEN", CANARY)
            patch.chdir(tmp_path)
            main([str(a) for a in arguments])
        assert time.monotonic() - start < LONGEST_S  # U7
        said = capsys.readouterr()
        assert CANARY not in said.out + said.err  # U6
        assert "Traceback" not in said.out + said.err  # U2
        return Outcome(int(ended.value.code or 0), said.out, said.err)

    return run


@pytest.fixture
def refused(cli: Cli, tmp_path: Path) -> Refused:
    """Run a command that must fail with `code`, say what and how to go on, and change nothing."""

    def run(*arguments: str | Path, code: Code, names: str | Iterable[str] = ()) -> Outcome:
        before = fingerprint([tmp_path])
        outcome = cli(*arguments)
        assert outcome.code == code.exit, outcome  # U1
        errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
        fixes = [line for line in outcome.err.splitlines() if line.startswith("  fix: ")]
        assert errors  # U2
        assert len(fixes) == len(errors), outcome.err
        for name in [names] if isinstance(names, str) else names:
            assert name in outcome.err, f"{name} in {outcome.err}"
        assert fingerprint([tmp_path]) == before  # U3, U4
        return outcome

    return run


_MEASURED = """
import sys
from pathlib import Path
from paretron.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    code = end.code
# Not ru_maxrss: that of a child starts with its parent's.
line = next(l for l in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in l)
print(code, line.split()[1], *sorted({"torch", "transformers"} & set(sys.modules)))
"""


def run_and_measure(*arguments: str | Path) -> tuple[int, int, list[str]]:
    """Run the command line in a process of its own: exit code, peak memory in kB, heavy modules."""
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, *map(str, arguments)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    code, peak_kb, *heavy = done.stdout.splitlines()[-1].split()
    return int(code), int(peak_kb), heavy


@pytest.fixture
def to_prune(pico: PicoMaker, tmp_path: Path) -> None:
    """A pico model and its scores, where a `Pruner` looks for them."""
    from picoscores import random_scores

    scores = tmp_path / "scores"
    scores.mkdir()
    random_scores(Checkpoint.open(pico())).save(scores)


@pytest.fixture(scope="session")
def pruners() -> Iterator[tuple[Pruner, Pruner]]:
    """Two, for what two do to each other."""
    both = Pruner(), Pruner()
    yield both
    for pruner in both:
        pruner.close()


@pytest.fixture
def pruner(pruners: tuple[Pruner, Pruner]) -> Pruner:
    """One that prunes."""
    return pruners[0]
