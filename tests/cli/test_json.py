"""docs/json.md against what the verbs print: neither has a key that the other lacks."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from makers import PicoMaker
from paretron.artifacts.manifest import Provenance, write_manifest
from paretron.cli.main import main
from picotask import TASK

PAGE = Path(__file__).parents[2] / "docs/json.md"
BENCH = Path(__file__).parents[1] / "profiling/data/bench"
ROW = re.compile(r"^\| `([^`]+)` \| ([^|]+) \|", re.M)
TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,), "int": (int,), "float": (int, float), "bool": (bool,),
    "null": (type(None),),
}  # fmt: skip
Say = Callable[..., Any]

RECIPE = """\
schema: 1
teacher: {model: ./model}
data:
  calibration: {corpus: stdlib, part: calibration, seq_len: 64}
  train: {corpus: stdlib, part: train, seq_len: 64}
  validation: {corpus: stdlib, part: validation, seq_len: 64, tokens: 640}
students:
  width: {hidden: 50}
  wide: {ffn: 9999}
  searched: {search: {space: {ffn: [64, 80]}, budget: {params: 1.0e+9}, rounds: []}}
distill: {tokens: 1.0e5, global_batch: 8}
"""


def documented() -> dict[str, dict[str, list[str]]]:
    """Section -> path -> the types that stand there."""
    found = {}
    for section in PAGE.read_text().split("\n## ")[1:]:
        title = section.partition("\n")[0].strip("`").removeprefix("paretron ")
        rows = {path: types.strip().split(" or ") for path, types in ROW.findall(section)}
        found[title.removesuffix(" --json")] = rows
    return found


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is no container, and every empty container, with its path."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and value:
        for inner in value:
            yield from leaves(inner, f"{path}[]")
    else:
        yield path, value


def is_at(path: str, pattern: str) -> bool:
    """Whether a path is one of a pattern: `*` is any key, and what is empty is a beginning."""
    text = ""
    for part in reversed(re.split(r"(?=\.|\[\])", pattern)):
        here = re.escape(part).replace(r"\*\*", r".+").replace(r"\*", r"[^.\[]+")
        text = f"{here}({text})?" if text else here
    return re.fullmatch(text, path) is not None


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Say:
    """What a command prints as JSON."""

    def run(*arguments: str | Path) -> Any:
        capsys.readouterr()
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit):
            main([*map(str, arguments), "--json"])
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def outputs(say: Say, pico: PicoMaker, own_cache: Path, tmp_path: Path) -> dict[str, Any]:
    """Outputs by section; between them, whatever may be absent is there once."""
    model = pico()
    (model / "consolidated.safetensors").write_bytes(b"")
    write_manifest(model, Provenance(kind="student"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    return {
        "plan": say("plan", recipe),
        "inspect": say("inspect", model),
        "verify": say("verify", model),
        "roofline": say("roofline", f"teacher={model}", f"other={model}", "--device", "H100"),
        "doctor": say("doctor", "--python", f"vllm={sys.executable}"),
        "recipes ls": say("recipes", "ls"),
        "recipes show": say("recipes", "show", "quickstart"),
        "recipes validate": say("recipes", "validate", recipe),
        "eval": say("eval", model, "--recipe", recipe, "--set", "students={a: {hidden: 48}}",
                    "--tasks", TASK, "--out", "numbers"),
        "export": say("export", model, "--to", "hf", "--out", "served"),
        "profile": say("profile", f"teacher={model}", f"other={model}", "--engine", "transformers",
                       "--input-len", "4", "--output-len", "2", "--repeats", "1",
                       "--out", "speeds"),
        "bench": say("bench", "vllm-serve", "--out", "theirs",
                     "--from", f"teacher={BENCH / 'vllm-serve-detailed.json'}",
                     "--from", f"other={BENCH / 'vllm-serve-plain.json'}"),
        "diff": say("diff", model, pico(name="other", hidden_size=48)),
        "Errors": say("inspect", tmp_path),
    }  # fmt: skip


def test_the_page_says_what_is_printed(outputs: dict[str, Any]) -> None:
    pages = documented()
    assert set(outputs) <= set(pages)
    for section, output in outputs.items():
        rows, found = pages[section], list(leaves(output))
        for path, value in found:
            types = [types for pattern, types in rows.items() if is_at(path, pattern)]
            assert types, f"{section}: {path} is not on the page"
            empty = value in ({}, [])
            allowed = tuple(kind for name in types[0] for kind in TYPES[name])
            assert empty or isinstance(value, allowed), f"{section}: {path} is {value!r}"
            assert isinstance(value, bool) <= (bool in allowed), f"{section}: {path}"
        unseen = [p for p in rows if not any(is_at(path, p) for path, _ in found)]
        assert unseen == [], f"{section}: not printed"


def test_every_verb_with_json_is_on_the_page() -> None:
    """By the help of every verb, so that a new one is not forgotten."""
    from typer.main import get_command

    from paretron.cli.main import app

    def verbs(command: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
        inner = getattr(command, "commands", None)
        if inner is None:
            if any("--json" in p.opts for p in command.params):
                yield " ".join(path)
            return
        for name, below in inner.items():
            yield from verbs(below, (*path, name))

    assert set(verbs(get_command(app))) == set(documented()) - {"Errors"}
