"""The plan as a person reads it: on a narrow terminal, with more students than fit beside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from makers import PicoMaker
from paretron.cli.main import main

RECIPE = """\
schema: 1
teacher: {model: ./model}
data:
  calibration: {corpus: stdlib, part: calibration, seq_len: 64}
  train: {corpus: stdlib, part: train, seq_len: 64}
  validation: {corpus: stdlib, part: validation, seq_len: 64}
distill: {tokens: 1.0e5, global_batch: 8}
students: %s
"""


def plan(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["plan", *map(str, arguments)])
    assert ended.value.code == 0
    said = capsys.readouterr()
    return said.out, said.err


@pytest.mark.parametrize("columns", [80, 120])
def test_nothing_is_cut_or_wrapped_in_a_table(
    columns: int,
    pico: PicoMaker,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    pico()
    monkeypatch.setenv("COLUMNS", str(columns))
    students = {f"student-{n}": {"hidden": n} for n in range(44, 53)}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE % json.dumps(students))
    text, _ = plan(capsys, recipe)
    found = json.loads(plan(capsys, recipe, "--json")[0])
    assert max(map(len, text.splitlines())) <= columns
    assert "…" not in text
    for name, facts in found["students"].items():
        assert f" {name} " in text
        assert f" {facts['params']} " in text
    advice = " ".join(text.partition("Will it be faster?")[2].split())
    for told in found["advice"]:
        assert f"{told['where']}: {told['finding']}" in advice
    assert "students.student-50.hidden: 50 is not a multiple of 16" in advice
    assert "nearest: 48 (-" in advice


def test_nothing_to_advise_is_not_mentioned(
    pico: PicoMaker, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pico("llama", head_dim=64, hidden_size=128, vocab_size=384)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE % "{a: {layers: 2}}")
    assert "faster" not in plan(capsys, recipe)[0]


def test_what_was_left_out_is_said_beside(
    pico: PicoMaker, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (pico() / "consolidated.safetensors").write_bytes(b"")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE % "{a: {layers: 2}}")
    _, err = plan(capsys, recipe)
    named = [line for line in err.splitlines() if "consolidated.safetensors" in line]
    assert len(named) == 1
    assert named[0].startswith("note: ")
    assert (
        named[0].removeprefix("note: ") in json.loads(plan(capsys, recipe, "--json")[0])["notices"]
    )
