"""What verbs print: problems the same way everywhere, sizes that a person reads."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from paretron.errors import Problem, redacted

if TYPE_CHECKING:
    from paretron.artifacts.reader import Checkpoint


def say_problems(problems: Sequence[Problem], *, as_json: bool) -> None:
    """Print problems on standard error, or on standard output as JSON."""
    if as_json:
        print(json.dumps({"problems": [p.as_json() for p in problems]}, indent=2))
        return
    for problem in problems:
        where = f"{problem.where}: " if problem.where else ""
        print(f"error: {where}{problem.cause}", file=sys.stderr)
        if problem.fix:
            print(f"  fix: {problem.fix}", file=sys.stderr)


def say_traceback() -> None:
    """Print the exception being handled on standard error, without access tokens."""
    print(redacted(traceback.format_exc()), file=sys.stderr, end="")


def say_notices(notices: Sequence[str]) -> None:
    """Print once each what was left out of an input, on standard error."""
    for notice in dict.fromkeys(notices):
        print(f"note: {notice}", file=sys.stderr)


def opened(model: Path) -> Checkpoint:
    """The checkpoint, checked from its headers, after saying what of it is left out."""
    from paretron.artifacts.reader import Checkpoint

    checkpoint = Checkpoint.open(model)
    say_notices(checkpoint.notices)
    return checkpoint


def say_json(value: object) -> None:
    """Print a value as JSON that any parser takes."""
    print(json.dumps(value, indent=2, allow_nan=False))


def count_text(number: float) -> str:
    """4512746496 -> 4.51B."""
    for scale, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= scale:
            return f"{number / scale:.2f}{unit}"
    return f"{number:.0f}"


def bytes_text(number: float) -> str:
    """9025492992 -> 9.03 GB."""
    for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(number) >= scale:
            return f"{number / scale:.2f} {unit}"
    return f"{number:.0f} B"


def seconds_text(seconds: float) -> str:
    """3725 -> 1 h 2 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    if seconds < 48 * 3600:
        return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"
    if seconds < 2 * 365 * 86400:
        return f"{seconds / 86400:.1f} days"
    return f"{seconds / (365.25 * 86400):.1f} years"
