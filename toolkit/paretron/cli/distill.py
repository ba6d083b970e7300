"""`paretron distill`: train a student against its teacher's logits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paretron.cli import options as o


def distill(
    student: Annotated[Path, typer.Argument(metavar="STUDENT", help="A pruned checkpoint.")],
    teacher: Annotated[Path, typer.Option(metavar="DIR", help="Its teacher's checkpoint.")],
    recipe: o.RecipeOption,
    out: o.Out,
    set_: o.Overrides = None,
    overwrite: o.Overwrite = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Distil STUDENT from its teacher with a recipe's data and settings; again to continue."""
    from paretron.cli.output import opened
    from paretron.cli.progress import Progress
    from paretron.recipe import load_recipe
    from paretron.run.single import train_alone

    loaded = load_recipe(recipe, overrides=set_ or ())
    opened(teacher)
    opened(student)
    with Progress(None, quiet=quiet) as progress:
        train_alone(
            "distill", student, teacher, loaded, loaded.distill,
            out=out, overwrite=overwrite, on_event=progress.of("distill"),
        )  # fmt: skip
    typer.echo(str(out))
