"""`paretron score`: what matters in a checkpoint."""

from __future__ import annotations

import typer

from paretron.cli import options as o


def score(
    model: o.ModelFolder,
    recipe: o.RecipeOption,
    out: o.Out,
    set_: o.Overrides = None,
    overwrite: o.Overwrite = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Score heads, MLP neurons, channels and layers of MODEL on a recipe's calibration text."""
    from paretron.artifacts.reader import Checkpoint
    from paretron.cli.progress import Progress
    from paretron.families import sizes
    from paretron.importance.stage import score_model
    from paretron.recipe import load_recipe
    from paretron.run.single import provenance_of, text_store

    loaded = load_recipe(recipe, overrides=set_ or ())
    checkpoint = Checkpoint.open(model)
    layers = sizes(checkpoint.family, checkpoint.config)["layers"]
    lost = {layers - s.layers for s in loaded.students.values() if s.layers}
    settings = {"score": loaded.score, "calibration": loaded.data.calibration}
    with (
        Progress(None, quiet=quiet) as progress,
        text_store(loaded.data.calibration, tokenizer=model) as store,
    ):
        score_model(
            model,
            store,
            score=loaded.score,
            calibration_settings=loaded.data.calibration,
            block_sizes=tuple(sorted(n for n in lost if 0 < n < layers)),
            seed=loaded.seed,
            out=out,
            provenance=provenance_of("score", {"model": model}, settings, seed=loaded.seed),
            overwrite=overwrite,
            on_event=progress.of("score"),
        )
    typer.echo(str(out))
