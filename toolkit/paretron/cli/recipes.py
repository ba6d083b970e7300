"""`paretron recipes`: the recipes that come with Paretron."""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated

import typer

from paretron.cli import options as o
from paretron.cli.output import say_json
from paretron.errors import Code, ParetronError, Problem

app = typer.Typer(help="List, show, copy and validate recipes.", no_args_is_help=True)
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="A shipped recipe's name.")]


@app.command("ls")
def list_recipes(as_json: o.Json = False) -> None:
    """List the shipped recipes with what each is for."""
    found = {name: _headline(path) for name, path in shipped().items()}
    if as_json:
        say_json(found)
        return
    width = max(map(len, found))
    for name, headline in found.items():
        typer.echo(f"{name:<{width}}  {headline}")


@app.command("show")
def show(name: NameArgument) -> None:
    """Print a shipped recipe."""
    typer.echo(_find(name).read_text("utf-8"), nl=False)


@app.command("cp")
def copy(
    name: NameArgument,
    target: Annotated[Path, typer.Argument(metavar="FILE", help="Where to copy it.")],
    overwrite: o.Overwrite = False,
) -> None:
    """Copy a shipped recipe, to be changed."""
    source = _find(name)
    if target.is_dir():
        target = target / f"{name}.yaml"
    if target.exists() and not overwrite:
        raise ParetronError(
            Problem(Code.OUT_EXISTS, "already exists", where=str(target), fix="add --overwrite")
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read_bytes())
    typer.echo(str(target))


@app.command("validate")
def validate(
    recipes: Annotated[list[Path], typer.Argument(metavar="RECIPE...", help="Recipes to check.")],
    set_: o.Overrides = None,
    as_json: o.Json = False,
) -> None:
    """Check recipes against the schema: every error of every file at once."""
    from paretron.recipe import load_recipe

    problems: list[Problem] = []
    for path in recipes:
        try:
            load_recipe(path, overrides=set_ or ())
        except ParetronError as error:
            problems += error.problems
    if problems:
        raise ParetronError(*problems)
    if as_json:
        say_json({"ok": True, "recipes": len(recipes)})
    else:
        typer.echo(f"ok: {len(recipes)} recipe(s)")


def shipped() -> dict[str, Traversable]:
    """The shipped recipes by name."""
    return {
        p.name.removesuffix(".yaml"): p
        for p in sorted(files("paretron_recipes").iterdir(), key=lambda p: p.name)
        if p.name.endswith(".yaml")
    }


def _find(name: str) -> Traversable:
    known = shipped()
    if name not in known:
        raise ParetronError(
            Problem(
                Code.USAGE,
                f"no shipped recipe is called {name!r}",
                where="recipes",
                fix=f"one of {', '.join(known)}",
            )
        )
    return known[name]


def _headline(path: Traversable) -> str:
    first = path.read_text("utf-8").splitlines()[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
