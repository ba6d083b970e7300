"""`paretron prune`: a smaller checkpoint from a checkpoint and its scores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paretron.cli import options as o

Size = Annotated[int | None, typer.Option(min=1, help="Target size of this axis.")]


def prune(
    model: o.ModelFolder,
    scores: Annotated[Path, typer.Option(metavar="DIR", help="What `paretron score` wrote.")],
    out: o.Out,
    hidden: Size = None,
    ffn: Size = None,
    heads: Size = None,
    kv_heads: Size = None,
    layers: Size = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Settings of pruning and scoring; defaults without.")
    ] = None,
    set_: o.Overrides = None,
    overwrite: o.Overwrite = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Cut MODEL to the sizes given, streaming from disk to disk."""
    from paretron.artifacts.reader import Checkpoint
    from paretron.artifacts.staging import refuse_overlap
    from paretron.cli.progress import Progress
    from paretron.errors import Code, ParetronError, Problem, raise_all
    from paretron.families import sizes
    from paretron.plan.shapes import student_sizes, target_problems
    from paretron.recipe import Prune, Score, Student, load_recipe
    from paretron.run.single import provenance_of
    from paretron.surgery.prune import prune as prune_checkpoint

    refuse_overlap(out, model)
    asked = {"hidden": hidden, "ffn": ffn, "heads": heads, "kv_heads": kv_heads, "layers": layers}
    if not any(asked.values()):
        raise ParetronError(
            Problem(
                Code.USAGE,
                "no target",
                fix="at least one of --hidden --ffn --heads --kv-heads --layers",
            )
        )
    target = Student(**asked)
    loaded = load_recipe(recipe, overrides=set_ or ()) if recipe else None
    settings = loaded.prune if loaded else Prune()
    ranking = loaded.score if loaded else Score()
    checkpoint = Checkpoint.open(model)
    have = sizes(checkpoint.family, checkpoint.config)
    raise_all(
        target_problems("--out", have, target, family=checkpoint.family, config=checkpoint.config)
    )
    parts = {"student": target, "prune": settings, "score": ranking}
    with Progress(None, quiet=quiet) as progress:
        prune_checkpoint(
            model,
            scores,
            sizes=student_sizes(have, target),
            prune=settings,
            score=ranking,
            out=out,
            provenance=provenance_of("prune", {"model": model, "scores": scores}, parts),
            overwrite=overwrite,
            on_event=progress.of("prune"),
        )
    typer.echo(str(out))
