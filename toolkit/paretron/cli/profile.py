"""`paretron profile`: measured speed of checkpoints on an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paretron.cli import options as o
from paretron.cli.completion import engine_names


def profile(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME=DIR...", help="Checkpoints or exports by name; `teacher` is the base."
        ),
    ],
    out: o.Out,
    engine: Annotated[
        str, typer.Option(help="An engine; see `paretron doctor`.", autocompletion=engine_names)
    ] = "ortgenai",
    python: Annotated[
        Path | None, typer.Option(help="Interpreter of an engine with its own environment.")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Batch sizes.")] = None,
    input_len: Annotated[int, typer.Option(min=1, help="Prompt tokens.")] = 128,
    output_len: Annotated[int, typer.Option(min=2, help="Generated tokens.")] = 128,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    warmup: Annotated[int, typer.Option(min=0)] = 1,
    overwrite: o.Overwrite = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Measure prefill and decode speed of several models, interleaved, on one engine."""
    from paretron.artifacts.staging import refuse_overlap
    from paretron.cli.progress import Progress
    from paretron.recipe import Engine, Profile
    from paretron.run.measure import PROFILE, models_by_name, publish_profile
    from paretron.run.single import provenance_of

    settings = Profile(
        engines=(Engine(name=engine, python=python.absolute() if python else None),),
        batches=tuple(batch or (1,)),
        lengths=((input_len, output_len),),
        repeats=repeats,
        warmup=warmup,
    )
    named = models_by_name(models, engine=engine)
    folders = {m.name: next(iter(m.folders.values())) for m in named}
    for folder in folders.values():
        refuse_overlap(out, folder)
    with Progress(None, quiet=quiet or as_json) as progress:
        publish_profile(
            named,
            profile=settings,
            seed=0,
            out=out,
            provenance=provenance_of("profile", folders, {"profile": settings}, seed=0),
            overwrite=overwrite,
            on_event=progress.of("profile"),
        )
    typer.echo((out / PROFILE).read_text() if as_json else str(out / PROFILE), nl=not as_json)
