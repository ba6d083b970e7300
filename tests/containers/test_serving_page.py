"""The page about serving: its own commands run, and what it says of files is so."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from makers import PicoMaker
from paretron.cli.main import main
from paretron.recipe import Export
from paretron_exporters.triton_repository import BACKENDS

pytest.importorskip("tritonclient.grpc")

TREE = Path(__file__).parents[2]
PAGE = (TREE / "docs/serving.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]


def words_of(command: str) -> list[str]:
    """The words of a command, without what is set in front of it or sends it away."""
    words = [w for w in shlex.split(command) if w != "&"]
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    return words


def test_five_commands_come_first() -> None:
    kind, text = BLOCKS[0]
    assert kind == "bash"
    assert len(text.splitlines()) == 5


def test_every_command_is_of_a_known_kind() -> None:
    kinds = {words_of(c)[0] for c in COMMANDS}
    assert kinds == {"paretron", "docker", "containers/run.sh", "curl", "python"}
    named = [w for c in COMMANDS for w in words_of(c) if w.startswith("containers/")]
    assert len(named) >= 7
    assert [n for n in named if not (TREE / n).is_file()] == []
    for command in COMMANDS:
        if " -t paretron/" in command:
            words = words_of(command)
            file = Path(words[words.index("-f") + 1])
            assert words[words.index("-t") + 1] == f"paretron/{file.name.split('.')[0]}"
            assert words[-1] == "containers"


def test_the_commands_of_paretron_make_what_the_clients_are_in(
    pico: PicoMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each export as it stands on the page; then each client says that there is no server."""
    pico(num_hidden_layers=1)
    shutil.move(tmp_path / "model", tmp_path / "RUN/stages/width.distill")
    monkeypatch.chdir(tmp_path)
    done = set()
    for command in COMMANDS:
        words = words_of(command)
        if words[0] == "paretron":
            with pytest.raises(SystemExit) as ended:
                main(words[1:])
            assert ended.value.code == 0
            done.add(words[words.index("--backend") + 1])
    assert done == set(BACKENDS)
    for command in COMMANDS:
        words = words_of(command)
        if words[0] == "python":
            nobody = ["--url", "127.0.0.1:9" if "grpc" in words[1] else "http://127.0.0.1:9"]
            asked = run([*words[1:], *nobody], tmp_path)
            assert asked.returncode == 1
            assert "127.0.0.1:9" in asked.stderr
            assert "Traceback" not in asked.stderr
    tree = next(text for kind, text in BLOCKS if kind == "" and text.startswith("served/"))
    for name in re.findall(r"[\w.]+(?:/|\.\w+)", tree):
        stem = name.rstrip("/")
        assert stem == "served" or list((tmp_path / "served").rglob(stem)), name


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], cwd=folder, capture_output=True, text=True, check=False,
        timeout=120,
    )  # fmt: skip


def test_the_recipe_of_the_page_is_one() -> None:
    (text,) = [text for kind, text in BLOCKS if kind == "yaml"]
    exports = [Export.model_validate(e) for e in YAML(typ="safe").load(text)["export"]]
    assert [e.label for e in exports] == ["hf", "triton-vllm-tp2"]


def test_what_can_be_asked_for_is_on_the_page() -> None:
    model = TREE / "exporters/paretron_exporters/triton_files/model.py.txt"
    (table,) = re.findall(r"^SAMPLING.*?^}", model.read_text(), re.MULTILINE | re.DOTALL)
    for name in re.findall(r'"(\w+)":', table):
        assert f"`{name}`" in PAGE
