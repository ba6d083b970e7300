"""`paretron prune`: a smaller checkpoint from a checkpoint and its scores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paretron.cli import options as o
from paretron.cli.output import opened

if TYPE_CHECKING:
    from pydantic import BaseModel

    from paretron.artifacts.reader import Checkpoint
    from paretron.recipe import Score, Student

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
    experts: Size = None,
    moe_ffn: Size = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Settings and calibration text; without, trimming alone.")
    ] = None,
    set_: o.Overrides = None,
    offline: o.Offline = False,
    overwrite: o.Overwrite = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Cut MODEL to the sizes given, streaming from disk to disk."""
    import shutil

    from paretron.artifacts.staging import refuse_overlap
    from paretron.cli.progress import Progress
    from paretron.families import sizes
    from paretron.plan.shapes import student_sizes
    from paretron.recipe import Prune, load_recipe
    from paretron.run.pruning import prune_model
    from paretron.run.single import provenance_of, text_store
    from paretron.surgery.ahead import in_background
    from paretron.surgery.prune import prune as prune_checkpoint

    refuse_overlap(out, model)
    target = _target(hidden=hidden, ffn=ffn, heads=heads, kv_heads=kv_heads, layers=layers,
                     experts=experts, moe_ffn=moe_ffn)  # fmt: skip
    loaded = load_recipe(recipe, overrides=set_ or ()) if recipe else None
    settings = loaded.prune if loaded else Prune()
    checkpoint = opened(model)
    have = sizes(checkpoint.family, checkpoint.config)
    _refuse(target, checkpoint)
    ranking = loaded.score if loaded else _as_scored(scores)
    parts: dict[str, BaseModel] = {"student": target, "prune": settings, "score": ranking}
    if loaded:
        parts |= {"compensate": loaded.compensate, "calibration": loaded.data.calibration}
    # The model's hash takes as long as pruning it: both at once.
    provenance = in_background(
        lambda: provenance_of(
            "prune", {"model": model, "scores": scores}, parts, seed=loaded.seed if loaded else None
        )
    )
    with Progress(None, quiet=quiet) as progress:
        if loaded is None:  # no text to compensate with
            prune_checkpoint(
                model,
                scores,
                sizes=student_sizes(have, target),
                prune=settings,
                score=ranking,
                out=out,
                provenance=provenance,
                overwrite=overwrite,
                on_event=progress.of("prune"),
            )
        else:
            state = out.parent / f".{out.name}.state"
            with text_store(loaded.data.calibration, tokenizer=model, offline=offline) as store:
                prune_model(
                    model,
                    scores,
                    store,
                    recipe=loaded,
                    sizes=student_sizes(have, target),
                    out=out,
                    state=state,
                    provenance=provenance,
                    overwrite=overwrite,
                    on_event=progress.of("prune"),
                )
            shutil.rmtree(state, ignore_errors=True)
    typer.echo(str(out))


def _as_scored(scores: Path) -> Score:
    """Units by the criterion of a scores folder, layers by what was measured of them."""
    from paretron.importance.scores import Scores
    from paretron.recipe import Score

    info = Scores.load(scores).info
    return Score(criterion=info.criterion, depth=info.depth())


def _refuse(target: Student, checkpoint: Checkpoint) -> None:
    """RECIPE_TARGET, said of the options that asked for it, for what cannot be had."""
    from paretron.errors import raise_all
    from paretron.families import sizes
    from paretron.plan.shapes import target_problems

    family, config = checkpoint.family, checkpoint.config
    problems = []
    for problem in target_problems("", sizes(family, config), target, family=family, config=config):
        axis = problem.where.rpartition(".")[2]
        option = f"--{axis.replace('_', '-')}" if axis else ""
        problems.append(replace(problem, where=option))
    raise_all(problems)


def _target(**asked: int | None) -> Student:

    from paretron.errors import Code, ParetronError, Problem
    from paretron.recipe import Student

    if not any(asked.values()):
        axes = " ".join(f"--{axis.replace('_', '-')}" for axis in asked)
        raise ParetronError(Problem(Code.USAGE, "no target", fix=f"at least one of {axes}"))
    return Student.model_validate(asked)
