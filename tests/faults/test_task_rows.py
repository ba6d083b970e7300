"""Tasks that cannot be asked or must not be: refused with a word, and nothing of them is run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from faults.conftest import Cli, Refused
from faults.test_hub_rows import online
from makers import PicoMaker
from paretron.errors import Code
from picotask import TASK, write_task

REACHES_PYTHON = "\"{{ self.__init__.__globals__['__builtins__']['open']('canary', 'w') }}\""
LINES = ['{"choices": ["a", "b"], "gold": 0}']
lm_eval = pytest.mark.skipif(
    subprocess.run([sys.executable, "-c", "import lm_eval"], capture_output=True).returncode != 0,
    reason="lm-eval is an extra",
)


def test_e1_tasks_without_lm_eval(
    refused: Refused, pico: PicoMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    refused(
        "eval", pico(), "--tasks", "piqa", "--out", "out",
        code=Code.OPTIONAL_MISSING, names=('pip install "paretron[eval]"', "lm-eval"),
    )  # fmt: skip


# id -> the arguments after the model, the code, what is named
ASKED: dict[str, tuple[tuple[str, ...], Code, str]] = {
    "R1-task": (("--tasks", "hellaswg"), Code.RECIPE_VALUE, "did you mean hellaswag"),
    "R2-suite": (("--suite", "minitron"), Code.USAGE, "there is minitron-base"),
    "R2-nothing": ((), Code.USAGE, "--recipe, --tasks or --suite"),
    "R2-set": (("--tasks", "piqa", "--set", "seed=1"), Code.USAGE, "add --recipe"),
    "R2-file": (("--tasks", "absent.yaml"), Code.INPUT_MISSING, "absent.yaml"),
    "R3-code": (("--tasks", "humaneval"), Code.UNSUPPORTED, "without a sandbox"),
}


@lm_eval
@pytest.mark.parametrize("row", ASKED)
def test_what_is_asked_for_wrongly(row: str, refused: Refused, pico: PicoMaker) -> None:
    arguments, code, named = ASKED[row]
    refused("eval", pico(), *arguments, "--out", "out", code=code, names=named)


@lm_eval
@pytest.mark.parametrize(
    "changes",
    [
        {"doc_to_target": "!function evil.run"},
        {"include": "evil.yaml"},
        {"process_docs": "!function evil.run"},
        {"doc_to_text": "!!python/object/apply:evil.run []"},
        {"metric_list": "[{metric: ./evil}]"},
        {"doc_to_text": REACHES_PYTHON},
    ],
    ids=["function", "include", "documents", "object", "metric", "template"],
)
def test_r3_a_tasks_file_runs_no_code(
    changes: dict[str, str], cli: Cli, pico: PicoMaker, own_cache: Path, tmp_path: Path
) -> None:
    model = pico(num_hidden_layers=1)
    (tmp_path / "evil.py").write_text("open('canary', 'w').close()\ndef run(*_): return 0\n")
    (tmp_path / "evil.yaml").write_text("doc_to_target: !function evil.run\n")
    path = write_task(tmp_path, "odd", LINES, **changes)
    outcome = cli("eval", model, "--tasks", path, "--out", "out", "--offline")
    assert outcome.code in (2, 6), outcome
    assert "odd.yaml" in outcome.err
    assert not (tmp_path / "canary").exists()
    assert not (tmp_path / "out").exists()


# Connections and look-ups of a process, counted where Python makes them.
_COUNTED = """
import sys
made = []
NET = ("socket.connect", "socket.getaddrinfo")
sys.addaudithook(lambda event, arguments: event in NET and made.append(arguments))
from paretron.cli.main import main
for arguments in (sys.argv[1:5], sys.argv[5:]):
    try:
        main(["eval", *arguments])
    except SystemExit as end:
        print("exit", end.code, "asked", len(made))
"""


@lm_eval
def test_i26_data_sets_offline_and_of_ones_own_need_no_network(
    pico: PicoMaker, tmp_path: Path
) -> None:
    model = str(pico())
    own = [model, "--tasks", str(TASK), "--out=own"]
    done = subprocess.run(
        [sys.executable, "-c", _COUNTED, *own, model, "--tasks", "piqa", "--out=out", "--offline"],
        capture_output=True, text=True, check=True, cwd=tmp_path,
        env=online(tmp_path, HF_DATASETS_CACHE=str(tmp_path / "cache")),
    )  # fmt: skip
    ends = [line for line in done.stdout.splitlines() if line.startswith("exit ")]
    assert ends == ["exit 0 asked 0", "exit 3 asked 0"], done.stderr
    assert "evaluate.tasks: piqa: lm-eval cannot load it" in done.stderr
    assert "fix: run once without --offline" in done.stderr
    assert "Traceback" not in done.stderr
