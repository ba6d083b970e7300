"""`paretron export`: a checkpoint in the form an engine loads, proven equal first."""

from __future__ import annotations

from typing import Annotated

import typer

from paretron.cli import options as o
from paretron.cli.completion import exporter_names


def export(
    model: o.ModelFolder,
    to: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="An exporter; see `paretron doctor`.",
            autocompletion=exporter_names,
        ),
    ],
    out: o.Out,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; the model's own without.")
    ] = None,
    overwrite: o.Overwrite = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Export MODEL and publish it only when it gives the same numbers."""
    from pydantic import ValidationError

    from paretron.artifacts.staging import refuse_overlap
    from paretron.cli.output import opened, say_json
    from paretron.cli.progress import Progress
    from paretron.errors import Code, ParetronError, Problem, raise_all
    from paretron.plugins import EXPORTERS, find_plugin
    from paretron.recipe import Export
    from paretron.run.single import provenance_of

    refuse_overlap(out, model)
    try:
        settings = Export.model_validate({"to": to, "dtype": dtype})
    except ValidationError as error:
        raise ParetronError(
            *(Problem(Code.USAGE, str(e["msg"]), where=f"--{e['loc'][0]}") for e in error.errors())
        ) from error
    exporter = find_plugin(EXPORTERS, to, where="--to")
    checkpoint = opened(model)
    raise_all(exporter.problems(checkpoint.config, export=settings))
    with Progress(None, quiet=quiet or as_json) as progress:
        parity = exporter.export(
            model,
            export=settings,
            out=out,
            provenance=provenance_of("export", {"model": model}, {"export": settings}),
            overwrite=overwrite,
            on_event=progress.of("export"),
        )
    if as_json:
        say_json(
            {
                "out": str(out),
                "parity": parity.as_json(),
                "notices": list(checkpoint.notices),
            }
        )
    else:
        typer.echo(str(out))
