"""`paretron table`: an operator table for a search's speed budget, measured on its engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paretron.cli import options as o


def table(
    recipe: o.RecipeFile,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Default: the budget's own `table`."),
    ] = None,
    student: Annotated[
        str | None, typer.Option(help="The student that searches, where several do.")
    ] = None,
    python: Annotated[
        Path | None, typer.Option(help="Interpreter of an engine with its own environment.")
    ] = None,
    set_: o.Overrides = None,
    offline: o.Offline = False,
    overwrite: o.Overwrite = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Time the shapes that RECIPE's student searches on the engine of its budget, random weights.

    What was measured until an interruption is kept beside FILE; the same command goes on.
    """
    from paretron.cli.output import say_json
    from paretron.cli.progress import Progress
    from paretron.errors import Code, ParetronError, Problem
    from paretron.recipe import load_recipe
    from paretron.run.tabling import Tabling, measure_table

    loaded = load_recipe(recipe, overrides=set_ or ())
    tabling = Tabling.of(loaded, student=student, python=python, offline=offline)
    place = out or (Path(tabling.speed.table) if tabling.speed.table is not None else None)
    if place is None:
        cause = f"the budget of {tabling.student} names no table"
        fix = "--out FILE, or `table: FILE` in the recipe"
        raise ParetronError(Problem(Code.USAGE, cause, where="--out", fix=fix))
    if place.exists() and not (overwrite and place.is_file()):
        fix = "another --out, or --overwrite"
        raise ParetronError(Problem(Code.OUT_EXISTS, "there already", where=str(place), fix=fix))
    journal = place.with_name(f".{place.name}.journal")
    with Progress(None, quiet=quiet or as_json) as progress:
        measured = measure_table(tabling, journal=journal, on_event=progress.of("table"))
    measured.save(place)
    journal.unlink()
    if as_json:
        say_json({"out": str(place), "table": measured.model_dump(mode="json", by_alias=True)})
    else:
        typer.echo(str(place))
