"""`paretron diff`: what differs between two runs, artifacts, profiles or reports."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paretron.cli import options as o
from paretron.cli.output import say_json, say_notices

if TYPE_CHECKING:
    from paretron.run.diff import Diff, Difference
    from paretron.run.diff_sides import Scalar

_WHERE = "A run, an artifact, a checkpoint, a report.json or a profile.json."
_MOST = 40  # rows of a part; --json has all


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help=_WHERE)],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another of the same kind.")],
    as_json: o.Json = False,
    verbose: o.Verbose = False,
) -> None:
    """Compare sizes, goals, speeds, losses, recipe, versions and tensors of A and B.

    No weight is read: bytes are compared by the manifests' sums. The exit code is 0 whether or not
    they differ.
    """
    from paretron.run.diff import diff as compare

    found = compare(a, b)
    if as_json:
        say_json(found.as_json())
        return
    say_notices(found.as_json()["notes"])
    _show(found)


def _show(found: Diff) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, markup=False, emoji=False)
    for part, rows in found.differences.items():
        table = Table(title=f"{part}: {len(rows)} of {found.compared[part]} differ",
                      title_justify="left", box=None, pad_edge=False)  # fmt: skip
        for name in ("", "A", "B", "B/A"):
            table.add_column(name, overflow="fold")
        for row in rows[:_MOST]:
            table.add_row(*(Text(_plain(cell)) for cell in _cells(row)))
        console.print(table)
        if len(rows) > _MOST:
            console.print(f"and {len(rows) - _MOST} more: --json has all")
        console.print()
    equal = [f"{part} ({n})" for part, n in found.compared.items() if part not in found.differences]
    if equal:
        console.print(f"equal: {', '.join(equal)}")
    if found.same:
        console.print("nothing differs" if not found.differences else "nothing differs but noise")


def _cells(row: Difference) -> tuple[str, str, str, str]:
    ratio = f"{row.ratio:.4g}" if row.ratio is not None else ""
    return row.key, _text(row.a), _text(row.b), ratio if row.apart else f"{ratio} within noise"


def _text(value: Scalar) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return f"{text[:16]}..." if len(text) == 64 and text.isalnum() else text  # a sha256


def _plain(text: str) -> str:
    """What a file says must not move the cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
