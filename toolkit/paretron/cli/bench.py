"""`paretron bench`: other tools' benchmarks, run or read, as the same profile.json."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paretron.cli import options as o
from paretron.cli.completion import engine_names, tool_names


def bench(
    tool: Annotated[
        str,
        typer.Argument(
            metavar="TOOL",
            help="vllm-serve, vllm-throughput, vllm-latency, trtllm-throughput, trtllm-latency "
            "or aiperf.",
            autocompletion=tool_names,
        ),
    ],
    out: o.Out,
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME=DIR]...", help="Checkpoints; `teacher` is the base."),
    ] = None,
    results: Annotated[
        list[str] | None,
        typer.Option(
            "--from", metavar="NAME=FILE", help="Read a result file of the tool, run nothing."
        ),
    ] = None,
    python: Annotated[
        Path | None, typer.Option(help="The interpreter that the tool is installed with.")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[=PYTHON]",
            help="What serves the models (vllm_server, of the tool's interpreter).",
            autocompletion=engine_names,
        ),
    ] = None,
    server: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=URL", help="Where a model is served already (openai)."),
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Requests sent at once.")] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Requests kept in flight.")] = None,
    rate: Annotated[float | None, typer.Option(help="Requests arriving a second.")] = None,
    requests: Annotated[
        int | None, typer.Option(min=1, help="Requests in a run of a loop.")
    ] = None,
    input_len: Annotated[int | None, typer.Option(min=1, help="Prompt tokens (128).")] = None,
    output_len: Annotated[int | None, typer.Option(min=2, help="Generated tokens (128).")] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    warmup: Annotated[int | None, typer.Option(min=0, help="Loads thrown away (1).")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1)] = 0,
    timeout_s: Annotated[float, typer.Option(min=1, help="Longest run of the tool.")] = 3600.0,
    overwrite: o.Overwrite = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Measure with another tool's benchmark, models in turns, or read what it left (--from)."""
    from paretron.cli.progress import Progress
    from paretron.run import bench as b
    from paretron.run.measure import PROFILE

    known = b.tool_named(tool)
    load = b.load_named(batch=batch, concurrency=concurrency, rate=rate)
    b.either(models or (), results or ())
    if results:
        stated = b.stated_of(load, input_len=input_len, output_len=output_len, warmup=warmup)
        b.publish_import(results, tool=known, stated=stated, out=out, overwrite=overwrite)
    else:
        if python is None:
            raise b.no_interpreter()
        settings = b.settings_of(
            tool, load, input_len=input_len, output_len=output_len, warmup=warmup,
            requests=requests, repeats=repeats, seed=seed, timeout_s=timeout_s,
        )  # fmt: skip
        named, served = b.models_and_server(
            models or (), tool=known, engine=engine, servers=server or (), python=python
        )
        with Progress(None, quiet=quiet or as_json) as progress:
            b.publish_bench(
                named, tool=known, python=python, settings=settings, served=served, out=out,
                overwrite=overwrite, on_event=progress.of("bench"),
            )  # fmt: skip
    typer.echo((out / PROFILE).read_text() if as_json else str(out / PROFILE), nl=not as_json)
