"""`paretron profile`: measured speed of checkpoints and exports on engines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from paretron.cli import options as o
from paretron.cli.completion import engine_names

if TYPE_CHECKING:
    from paretron.recipe import Profile


Models = Annotated[
    list[str],
    typer.Argument(
        metavar="NAME=DIR[,DIR]...",
        help="Checkpoints and exports by name, a folder for each form; `teacher` is the base.",
    ),
]
Engines = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[=PYTHON]",
        help="Engines (ortgenai), those of their own environment with its interpreter.",
        autocompletion=engine_names,
    ),
]


def profile(
    models: Models,
    out: o.Out,
    engine: Engines = None,
    server: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=URL", help="Where a model is served already (openai)."),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Requests sent at once (1, if no other load).")
    ] = None,
    concurrency: Annotated[
        list[int] | None, typer.Option(min=1, help="Requests kept in flight.")
    ] = None,
    rate: Annotated[list[float] | None, typer.Option(help="Requests arriving a second.")] = None,
    requests: Annotated[
        int | None, typer.Option(min=1, help="Requests in a sample of a loop.")
    ] = None,
    input_len: Annotated[int, typer.Option(min=1, help="Prompt tokens.")] = 128,
    output_len: Annotated[int, typer.Option(min=2, help="Generated tokens.")] = 128,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    warmup: Annotated[int, typer.Option(min=0)] = 1,
    min_seconds: Annotated[float, typer.Option(min=0, help="Measure for so long in all.")] = 0.0,
    slo_ttft_ms: Annotated[float, typer.Option(help="Slowest good first token.")] = 2000.0,
    slo_tpot_ms: Annotated[float, typer.Option(help="Slowest good further token.")] = 100.0,
    in_turn: Annotated[
        bool,
        typer.Option(
            "--in-turn", help="Open models anew in every round; intervals hold that, too."
        ),
    ] = False,
    strict: o.Strict = False,
    overwrite: o.Overwrite = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Measure prefill, decode and latency of several models, interleaved, on every engine."""
    from paretron.artifacts.staging import refuse_overlap
    from paretron.cli.progress import Progress
    from paretron.run.measure import (
        PROFILE,
        engines_by_name,
        models_by_name,
        publish_profile,
        require_unflagged,
    )
    from paretron.run.single import provenance_of

    settings = _section(
        engines=engines_by_name(engine or ["ortgenai"], servers=server or ()),
        batches=batch or ([] if concurrency or rate else [1]),
        concurrency=concurrency or [],
        rates=rate or [],
        requests=requests,
        lengths=[[input_len, output_len]],
        repeats=repeats,
        warmup=warmup,
        min_seconds=min_seconds,
        slo={"ttft_ms": slo_ttft_ms, "tpot_ms": slo_tpot_ms},
        sessions="in_turn" if in_turn else "auto",
    )
    named = models_by_name(models, engines=settings.engines)
    folders = {f"{m.name}.{form}": place for m in named for form, place in m.folders.items()}
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
    if strict:
        require_unflagged(out)


def _section(**given: object) -> Profile:
    """The section of a recipe that the options stand for; USAGE where they do not fit."""
    from pydantic import ValidationError

    from paretron.errors import Code, ParetronError, Problem
    from paretron.recipe import Profile

    try:
        return Profile.model_validate(given)
    except ValidationError as error:
        raise ParetronError(
            *(
                Problem(Code.USAGE, e["msg"].removeprefix("Value error, "), _place(e["loc"]))
                for e in error.errors()
            )
        ) from error


def _place(loc: tuple[int | str, ...]) -> str:
    """Where it would stand in a recipe."""
    return ".".join(map(str, ("profile", *loc)))
