"""The families there are, and finding the one that a config belongs to.

Every `Family` in a module of this package is one, so a new family is a new file.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from paretron.errors import Code, ParetronError, Problem
from paretron.families.table import Family


def _tables() -> Iterator[Family]:
    folder = Path(__file__).parent
    for name in sorted(m.name for m in iter_modules([str(folder)]) if m.name != "registry"):
        found = vars(import_module(f"paretron.families.{name}")).values()
        yield from (value for value in found if isinstance(value, Family))


FAMILIES: dict[str, Family] = {
    f.model_type: f for f in sorted(_tables(), key=lambda f: f.model_type)
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a Hugging Face config; INPUT_FAMILY when no table covers it."""
    model_type = config.get("model_type")
    supported = ", ".join(FAMILIES)
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        close = difflib.get_close_matches(str(model_type), FAMILIES, n=1)
        hint = f"; the closest is {close[0]}" if close else ""
        raise ParetronError(
            Problem(
                Code.INPUT_FAMILY,
                f"model_type {str(model_type)[:60]!r} is not supported",
                where="config.json: model_type",
                fix=f"supported: {supported}{hint}",
            )
        )
    family = FAMILIES[model_type]
    architectures = config.get("architectures")
    if architectures is not None and architectures != [family.architecture]:
        raise ParetronError(
            Problem(
                Code.INPUT_FAMILY,
                f"architectures is {str(architectures)[:80]}",
                where="config.json: architectures",
                fix=f"{model_type} is supported as {family.architecture}",
            )
        )
    return family
