"""The instructions of a Dockerfile, as far as ours use them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Instruction:
    """One instruction with its lines joined, e.g. ("RUN", "pip install x && rm y")."""

    name: str
    text: str


def instructions(path: Path) -> list[Instruction]:
    """Every instruction in order; comments and empty lines are left out."""
    lines = [x for x in path.read_text("utf-8").splitlines() if not x.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [Instruction(name.upper(), text.strip()) for name, text in found]


def arguments(path: Path) -> Iterator[tuple[str, str]]:
    """Name and default of every ARG that has a default."""
    for instruction in instructions(path):
        name, _, default = instruction.text.partition("=")
        if instruction.name == "ARG" and default:
            yield name, default


def environment(path: Path) -> dict[str, str]:
    """What ENV sets; no value of ours has a space."""
    pairs = [i.text.split() for i in instructions(path) if i.name == "ENV"]
    return dict(pair.split("=", 1) for line in pairs for pair in line)
