"""The card: whatever a user typed stands in it as text."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from paretron.artifacts.card import SNIPPETS, write_card
from paretron.artifacts.staging import Provenance

HOSTILE = (
    '<script>alert("x")</script>', "line\n# Heading\n- item", "`code`", "| a | b |", "[a](b)",
    "{{ 7 * 7 }}", "```\n\nfence", "</details>", '"quoted"', "\\", "é 日本", "{% if x %}",
)  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_opens_nothing(text: str, tmp_path: Path) -> None:
    write_card(
        tmp_path,
        title=text,
        about=text,
        provenance=Provenance("export", {text: text}, {"a": {text: text}}, seed=3, stamp=text),
        numbers={text: text},
    )
    card = (tmp_path / "README.md").read_text("utf-8")
    outside = re.sub(r"^```.*?^```$", "", card, flags=re.DOTALL | re.MULTILINE)
    assert "<" not in re.sub(r"`[^`\n]*`", "", outside)
    assert "49" not in card
    headings = re.findall(r"^#.*", outside, flags=re.MULTILINE)
    assert len(headings) == 1 + 2 + 1  # title, two engines, where it comes from
    rows = [line for line in outside.splitlines() if line.startswith("|")]
    assert len(rows) == 3
    assert re.sub(r"\\.", "", rows[2]).count("|") == 3
    (settings,) = re.findall(r"^```json\n(.*?)^```$", card, flags=re.DOTALL | re.MULTILINE)
    assert json.loads(settings) == {"a": {text: text}}


def test_what_is_not_there_is_left_out(tmp_path: Path) -> None:
    write_card(
        tmp_path, title="A", about="b", provenance=Provenance("student"), numbers={}, engines=()
    )
    card = (tmp_path / "README.md").read_text()
    assert card.startswith('---\nlibrary_name: "transformers"\n')
    assert "TEST" not in card
    assert "figure" not in card
    assert "seed" not in card
    assert "python" not in card


@pytest.mark.parametrize("engine", SNIPPETS)
def test_a_snippet_is_python(engine: str) -> None:
    compile(SNIPPETS[engine], engine, "exec")
