"""`paretron recipes`: the recipes that come with Paretron."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import replace
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated

import typer

from paretron.cli import options as o
from paretron.cli.completion import recipe_names
from paretron.cli.output import say_json
from paretron.errors import Code, ParetronError, Problem

app = typer.Typer(help="List, show, copy and validate recipes.", no_args_is_help=True)
NameArgument = Annotated[
    str,
    typer.Argument(metavar="NAME", help="A shipped recipe's name.", autocompletion=recipe_names),
]


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
def show(name: NameArgument, as_json: o.Json = False) -> None:
    """Print a shipped recipe."""
    path = _find(name)
    text = path.read_text("utf-8")
    if as_json:
        say_json({"name": name, "about": _headline(path), "text": text})
    else:
        typer.echo(text, nl=False)


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
    """Check recipes against the schema and what is installed: every error of every file at once."""
    from paretron.plan.plan import find_exporters
    from paretron.plugins import ENGINES, find_plugin
    from paretron.recipe import load_recipe

    problems: list[Problem] = []
    for path in recipes:
        try:
            loaded = load_recipe(path, overrides=set_ or ())
        except ParetronError as error:
            problems += error.problems
            continue
        unknown = find_exporters(loaded)[1]
        for k, engine in enumerate(loaded.profile.engines if loaded.profile else ()):
            try:
                find_plugin(ENGINES, engine.name, where=f"profile.engines.{k}.name")
            except ParetronError as error:
                unknown += error.problems
        problems += [replace(p, where=f"{path}: {p.where}") for p in unknown]
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
                fix=_closest(name, known),
            )
        )
    return known[name]


def _closest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"one of {', '.join(known)}"


def _headline(path: Traversable) -> str:
    first = path.read_text("utf-8").splitlines()[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
