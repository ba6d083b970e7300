"""`paretron correct`: let a teacher see the distillation text before it teaches."""

from __future__ import annotations

import typer

from paretron.cli import options as o


def correct(
    model: o.ModelFolder,
    recipe: o.RecipeOption,
    out: o.Out,
    set_: o.Overrides = None,
    offline: o.Offline = False,
    overwrite: o.Overwrite = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Train MODEL on a recipe's distillation text by plain language-model loss (paper 2)."""
    from paretron.cli.output import opened
    from paretron.cli.progress import Progress
    from paretron.errors import Code, ParetronError, Problem
    from paretron.recipe import load_recipe
    from paretron.run.single import train_alone
    from paretron.workers.launch import process_rank

    loaded = load_recipe(recipe, overrides=set_ or ())
    if loaded.serial_correction is None:
        cause, fix = "the recipe has no section `correct`", "add one, or --set correct.tokens=1.0e8"
        if loaded.correct is not None:
            cause = "in mode parallel a teacher is corrected by `paretron distill`, as it teaches"
            fix = "paretron distill, or --set correct.mode=serial"
        raise ParetronError(Problem(Code.USAGE, cause, where=str(recipe), fix=fix))
    opened(model)
    leads = process_rank() == 0  # of a torchrun of the user's own
    with Progress(None, quiet=quiet or not leads) as progress:
        train_alone(
            "correct", model, None, loaded,
            loaded.serial_correction.model_copy(update={"trial": None}),  # of `paretron run`
            out=out, overwrite=overwrite, offline=offline,
            on_event=progress.of("correct"),
        )  # fmt: skip
    if leads:
        typer.echo(str(out))
