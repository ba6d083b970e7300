"""`paretron search`: the shapes of a recipe's searched students, and nothing after them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from paretron.cli import options as o

if TYPE_CHECKING:
    from paretron.plan.stages import Stage


def search(
    recipe: o.RecipeFile,
    out: o.RunOut = None,
    set_: o.Overrides = None,
    offline: o.Offline = False,
    overwrite: o.Overwrite = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Find the shapes that RECIPE's students search for; `paretron run` goes on from there."""
    from paretron.artifacts.jsonfile import read_object
    from paretron.cli.output import say_json
    from paretron.cli.progress import Progress
    from paretron.errors import Code, ParetronError, Problem
    from paretron.plan.plan import make_plan
    from paretron.recipe import load_recipe
    from paretron.run.runner import run_plan
    from paretron.run.stages import STAGES
    from paretron.run.workspace import Workspace
    from paretron.search.stage import SEARCH

    loaded = load_recipe(recipe, overrides=set_ or ())
    names = [name for name, student in loaded.students.items() if student.search is not None]
    if not names:
        raise ParetronError(
            Problem(
                Code.USAGE,
                "no student of this recipe searches for its shape",
                where=str(recipe),
                fix="students: {best: {search: {space: ..., budget: ..., rounds: ...}}}",
            )
        )
    folder = out or Path("runs") / recipe.stem
    plan = make_plan(loaded, out=folder, offline=offline)
    plan = dataclasses.replace(
        plan, stages=upstream(plan.stages, {f"{name}.search" for name in names})
    )
    with Progress(plan, quiet=quiet or as_json) as watcher:
        run_plan(plan, folder, stages=STAGES, offline=offline, overwrite=overwrite, watcher=watcher)
    places = {name: Workspace(folder).artifact(f"{name}.search") for name in names}
    results = {n: read_object(p / SEARCH, code=Code.INPUT_MANIFEST) for n, p in places.items()}
    if as_json:
        say_json({"out": str(folder), "searches": results})
        return
    for name, result in results.items():
        _show(name, result, places[name])


def upstream(stages: tuple[Stage, ...], wanted: set[str]) -> tuple[Stage, ...]:
    """The stages that these need, themselves included, in order."""
    needed = set(wanted)
    for stage in reversed(stages):
        if stage.name in needed:
            needed |= set(stage.inputs.values())
    return tuple(stage for stage in stages if stage.name in needed)


def _show(name: str, result: Mapping[str, Any], place: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from paretron.search.page import PAGE, summary, table

    console = Console(highlight=False)
    heads, rows = table(result)
    shown = Table(title=name, title_justify="left")
    for k, head in enumerate(heads):
        shown.add_column(head, justify="right" if k else "left", no_wrap=bool(k))
    for row in rows[:20]:
        shown.add_row(*row)
    console.print(shown)
    if len(rows) > 20:
        console.print(f"and {len(rows) - 20} more", markup=False)
    console.print(summary(result), markup=False)
    typer.echo(f"page: {place / PAGE}")
