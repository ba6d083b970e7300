"""`paretron score`: what matters in a checkpoint."""

from __future__ import annotations

import typer

from paretron.cli import options as o
from paretron.cli.output import opened


def score(
    model: o.ModelFolder,
    recipe: o.RecipeOption,
    out: o.Out,
    set_: o.Overrides = None,
    offline: o.Offline = False,
    overwrite: o.Overwrite = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Score heads, MLP neurons, channels and layers of MODEL on a recipe's calibration text.

    Run under torchrun, each process takes its share of the samples.
    """
    import shutil

    from paretron.artifacts.staging import refuse_overlap
    from paretron.cli.progress import Progress
    from paretron.families import sizes
    from paretron.importance.picture import PICTURE
    from paretron.importance.scores import Scores
    from paretron.importance.stage import score_model
    from paretron.importance.tables import score_tables
    from paretron.recipe import load_recipe
    from paretron.run.signals import interruptible
    from paretron.run.single import provenance_of, text_store
    from paretron.workers.launch import process_rank

    refuse_overlap(out, model)
    loaded = load_recipe(recipe, overrides=set_ or ())
    checkpoint = opened(model)
    layers = sizes(checkpoint.family, checkpoint.config)["layers"]
    lost = {layers - loaded.score.after(1, have=layers, want=n)
            for s in loaded.students.values() for n in s.layer_counts()}  # fmt: skip
    settings = {"score": loaded.score, "calibration": loaded.data.calibration}
    state = out.parent / f".{out.name}.state"
    leads = process_rank() == 0
    with (
        interruptible(),
        Progress(None, quiet=quiet or not leads) as progress,
        text_store(loaded.data.calibration, tokenizer=model, offline=offline) as store,
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
            state=state,
            overwrite=overwrite,
            on_event=progress.of("score"),
        )
    if not leads:
        return
    shutil.rmtree(state, ignore_errors=True)
    if not quiet:
        for table in score_tables(Scores.load(out), loaded.score):
            typer.echo(f"{table.text()}\n")
        typer.echo(f"picture: {out / PICTURE}")
    typer.echo(str(out))
