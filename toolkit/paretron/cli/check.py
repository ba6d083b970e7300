"""`paretron check`: the whole recipe on a two-layer twin, so that the last stage fails first."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paretron.cli import options as o


def check(
    recipe: o.RecipeFile,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="Keep the TEST run here."),
    ] = None,
    set_: o.Overrides = None,
    offline: o.Offline = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Run every stage, export and gate of a recipe on a tiny twin of its teacher."""
    from paretron.cli.output import say_json
    from paretron.cli.progress import Progress
    from paretron.recipe import load_recipe
    from paretron.run.check import check_recipe

    loaded = load_recipe(recipe, overrides=set_ or ())
    with Progress(None, quiet=quiet or as_json) as progress:
        done = check_recipe(loaded, out=out, offline=offline, watcher=progress)
    if as_json:
        say_json({"ok": True, "stages": list(done), "notices": progress.notices})
    else:
        typer.echo(f"ok: {len(done)} stages ran on the two-layer twin of the teacher (TEST)")
