"""What a shell offers, what a machine has: torch is needed for neither."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from paretron.cli.doctor import below_floor
from paretron.cli.main import EXIT_CODES
from paretron.errors import Code
from picorun import paretron

_COMPLETED = """
import atexit, sys
from paretron.cli.main import main
heavy = {"torch", "transformers"}
atexit.register(lambda: print(*sorted(heavy & set(sys.modules)), file=sys.stderr))
main([])
"""


def offered(line: str) -> list[str]:
    """What bash offers after a line, its last word begun."""
    words = line.split(" ")
    environment = os.environ | {
        "_PARETRON_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-c", _COMPLETED], env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.stderr.split() == []
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "some"),
    [
        ("paretron re", {"report", "recipes"}),
        ("paretron recipes ", {"ls", "show", "cp", "validate"}),
        ("paretron recipes show q", {"quickstart"}),
        ("paretron recipes cp llama", {"llama-3.1-8b"}),
        ("paretron export model --to ", {"hf", "onnx"}),
        ("paretron profile --engine or", {"ortgenai"}),
        ("paretron plan x.yaml --set distill.loss.t", {"distill.loss.temperature="}),
        ("paretron plan --off", {"--offline"}),
    ],
)
def test_words_are_completed(line: str, some: set[str]) -> None:
    found = offered(line)
    assert some <= set(found)
    assert all(word.startswith(line.rpartition(" ")[2]) for word in found)


def test_completion_is_shown_for_a_shell() -> None:
    """The shell is the nearest that started the command, so one is put there."""
    command = f"{shlex.quote(sys.executable)} -m paretron --show-completion; true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "_PARETRON_COMPLETE" in done.stdout, done.stderr


def test_help_and_readme_tell_every_exit_code() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert all(f"| {code} | {what} |" in readme for code, what in EXIT_CODES.items())
    said = " ".join(paretron("--help").stdout.split())
    assert {0, 1} | {code.exit for code in Code} == set(EXIT_CODES)
    assert all(f"{code} {what}" in said for code, what in EXIT_CODES.items())


def test_doctor_asks_an_engine_s_own_interpreter(tmp_path: Path) -> None:
    """A script stands for the interpreter: it answers what an old environment would."""
    python = tmp_path / "python"
    python.write_text("""#!/bin/sh\necho '{"torch": "2.9.1+cpu", "vllm": "0.17.0"}'\n""")
    python.chmod(0o755)
    done = paretron("doctor", "--json", "--python", f"vllm={python}")
    assert done.returncode == Code.OPTIONAL_OLD.exit
    found = json.loads(done.stdout)
    assert found["below_floor"] == ["vllm: torch", "vllm: vllm"]
    assert found["engines"]["vllm"]["packages"] == {"torch": "2.9.1+cpu", "vllm": "0.17.0"}
    assert not found["engines"]["vllm"]["ready"]
    assert found["engines"]["transformers"]["ready"]
    text = paretron("doctor", "--python", f"vllm={python}")
    assert "known vulnerability is open below 0.18" in text.stdout


@pytest.mark.parametrize(
    ("name", "says"), [("vlm=x", "did you mean vllm?"), ("vllm", "ENGINE=PATH"), ("=x", "ENGINE")]
)
def test_doctor_and_an_engine_that_is_none(name: str, says: str) -> None:
    done = paretron("doctor", "--python", name)
    assert done.returncode == 2
    assert says in done.stderr


def test_floors() -> None:
    assert below_floor({"torch": "2.10.0", "onnx": None, "transformers": "5.3"}) == []
    assert below_floor({"torch": "2.9.9", "onnx": "1.20.1"}) == ["torch", "onnx"]
