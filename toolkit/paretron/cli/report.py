"""`paretron report`: a run's page, made again from what it measured; or several runs compared."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paretron.cli import options as o


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Runs, or what `profile` wrote.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="Where to write; left out: the one run."),
    ] = None,
    overwrite: o.Overwrite = False,
    require_goals: o.RequireGoals = False,
    as_json: o.Json = False,
    verbose: o.Verbose = False,
) -> None:
    """Write a run's report anew, or one that compares several runs, as HTML, Markdown and JSON."""
    import json

    from paretron.run.rereporting import report_of, rewrite_report, stands_alone
    from paretron_profiling.goals import require

    if out is None and stands_alone(runs):
        folder = rewrite_report(runs[0])
    else:
        folder = report_of(runs, out=out, overwrite=overwrite)
    text = (folder / "report.json").read_text("utf-8")
    if require_goals:  # before anything is printed: what is printed is one JSON value
        require(json.loads(text)["goals"], where=str(folder / "report.html"))
    if as_json:
        typer.echo(text, nl=False)
    else:
        typer.echo(f"report: {folder / 'report.html'}")
