"""`paretron report`: a run's page, made again from what the run measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paretron.cli import options as o


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    as_json: o.Json = False,
    verbose: o.Verbose = False,
) -> None:
    """Print a run's report.json, or write report.html and report.json anew."""
    from paretron.run.reporting import rewrite_report

    folder = rewrite_report(run)
    if as_json:
        typer.echo((folder / "report.json").read_text("utf-8"), nl=False)
    else:
        typer.echo(f"report: {folder / 'report.html'}")
