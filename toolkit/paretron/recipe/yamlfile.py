"""YAML without surprises: duplicate keys, tags, aliases beyond reason and huge files refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import ComposerError
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, ScalarEvent

from paretron.errors import Code, ParetronError, Problem

# The parser takes a second for 20 kB, and its time grows with the square of the depth.
MAX_RECIPE_BYTES = 50_000
MAX_DEPTH = 20


def read_yaml(path: Path) -> dict[str, Any]:
    """One YAML mapping from a file of at most 50 kB; RECIPE_SYNTAX for all a recipe never needs."""
    if not os.path.isfile(path):  # also for a name that the file system refuses
        raise ParetronError(
            Problem(
                Code.RECIPE_SYNTAX,
                "no such file",
                where=str(path)[:200],
                fix="`paretron recipes ls` shows the ones that come with Paretron",
            )
        )
    if path.stat().st_size > MAX_RECIPE_BYTES:
        raise _syntax(path, f"larger than {MAX_RECIPE_BYTES} bytes, so not a recipe")
    try:
        text = path.read_text("utf-8")
        _refuse_events(path, text)
        value = _yaml().load(text)
    except DuplicateKeyError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        what = str(error.problem).split(" with value")[0].replace("found duplicate key ", "")
        raise _syntax(path, f"the key {what} stands twice", line=line) from error
    except (MarkedYAMLError, ComposerError) as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise _syntax(path, str(error.problem), line=line) from error
    except (YAMLError, RecursionError, ValueError, TypeError, OverflowError) as error:
        raise _syntax(path, " ".join(str(error).split())[:200]) from error
    if not isinstance(value, dict):
        raise _syntax(path, "not a mapping of sections")
    return value


def parse_scalar(text: str) -> Any:
    """A value as a recipe would hold it: `false`, `3`, `[1, 2]`, `null`, or a string."""
    try:
        _refuse_events(Path("--set"), text)
        return _yaml().load(text)
    except (YAMLError, RecursionError, ValueError, TypeError, OverflowError, ParetronError):
        return text


def _yaml() -> YAML:
    # Pure and safe: the loader of plain values in Python, with YAML 1.2's booleans.
    return YAML(typ="safe", pure=True)


def _refuse_events(path: Path, text: str) -> None:
    """Tags, aliases and depth are seen before anything is built from them."""
    depth = 0
    for event in _yaml().parse(text):
        line = event.start_mark.line + 1
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise _syntax(path, f"nested deeper than {MAX_DEPTH} levels", line=line)
        if isinstance(event, AliasEvent):
            raise _syntax(path, "aliases (*name) are not used in recipes", line=line)
        if isinstance(event, ScalarEvent | CollectionStartEvent) and event.tag:
            raise _syntax(path, f"the tag {str(event.tag)[:80]} is not allowed", line=line)


def _syntax(path: Path, cause: str, *, line: int = 0) -> ParetronError:
    where = f"{path}:{line}" if line else str(path)
    fix = "plain YAML, one mapping of sections; `paretron recipes show quickstart` is an example"
    return ParetronError(Problem(Code.RECIPE_SYNTAX, cause, where=where, fix=fix))
