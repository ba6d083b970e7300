"""`paretron export`: a checkpoint in the form an engine loads, proven equal first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paretron.cli import options as o
from paretron.cli.completion import exporter_names

if TYPE_CHECKING:
    from paretron.recipe import Export


To = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="An exporter; see `paretron doctor`.",
        autocompletion=exporter_names,
    ),
]
Texts = Annotated[
    Path | None,
    typer.Option("--recipe", metavar="RECIPE", help="Whose texts calibrate and judge FORM."),
]
# Cause, where, fix of a text that nothing asks for.
_NO_FORM = (
    "a recipe's texts are for --quantize",
    "--recipe",
    "add --quantize FORM, or leave it out",
)


def export(
    model: o.ModelFolder,
    to: To,
    out: o.Out,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; the model's own without.")
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(metavar="FORM", help="A form of fewer bits, e.g. fp8 or q8_0.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="The engine of a Triton repository: vllm, onnx, trtllm.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="What a graph is for: cpu or cuda.")] = None,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Devices that share a layer.")] = 1,
    pipeline_parallel: Annotated[int, typer.Option(min=1, help="Devices one behind another.")] = 1,
    build: Annotated[
        bool, typer.Option("--build", help="Insist on the engine, not only what it is built of.")
    ] = False,
    recipe: Texts = None,
    set_: o.Overrides = None,
    offline: o.Offline = False,
    overwrite: o.Overwrite = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Export MODEL and publish it only when it gives the same numbers."""
    from contextlib import ExitStack

    from paretron.artifacts.staging import refuse_overlap
    from paretron.cli.output import opened, say_json
    from paretron.cli.progress import Progress
    from paretron.errors import Code, ParetronError, Problem, raise_all
    from paretron.plugins import EXPORTERS, find_plugin
    from paretron.recipe import load_recipe
    from paretron.run.single import export_texts, provenance_of

    refuse_overlap(out, model)
    settings = _section(
        to=to,
        dtype=dtype,
        quantize=quantize,
        backend=backend,
        device=device,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        build=build,
    )
    if recipe is not None and quantize is None:
        raise ParetronError(Problem(Code.USAGE, *_NO_FORM))
    exporter = find_plugin(EXPORTERS, to, where="--to")
    checkpoint = opened(model)
    raise_all(exporter.problems(checkpoint.config, export=settings))
    with ExitStack() as stack, Progress(None, quiet=quiet or as_json) as progress:
        texts = None
        if recipe is not None and quantize is not None:
            loaded = load_recipe(recipe, overrides=set_ or ())
            texts = stack.enter_context(export_texts(loaded, tokenizer=model, offline=offline))
        parity = exporter.export(
            model,
            export=settings,
            texts=texts,
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


def _section(**given: object) -> Export:
    """The section of a recipe that the options stand for; USAGE where they do not fit."""
    from pydantic import ValidationError

    from paretron.errors import Code, ParetronError, Problem
    from paretron.recipe import Export

    try:
        return Export.model_validate(given)
    except ValidationError as error:
        raise ParetronError(
            *(
                Problem(Code.USAGE, e["msg"].removeprefix("Value error, "), _option(e["loc"]))
                for e in error.errors()
            )
        ) from error


def _option(loc: tuple[int | str, ...]) -> str:
    """The option that a setting was given by; none for what holds between several."""
    return f"--{loc[0]}".replace("_", "-") if loc else ""
