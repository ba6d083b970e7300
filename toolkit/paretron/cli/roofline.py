"""`paretron roofline`: how fast models could be on a device, from their config.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paretron.cli import options as o
from paretron.cli.output import bytes_text

if TYPE_CHECKING:
    from paretron_profiling.roofline.bounds import Costs, Launches
    from paretron_profiling.roofline.devices import Device

_MOST_BATCH = 1 << 20
_MOST_TOKENS = 1 << 24
_RULES = {"same_batch": "same batch", "same_memory": "same memory"}


def roofline(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME=DIR...",
            help="Folders with a config.json, by name; `teacher` is the base. No weights needed.",
        ),
    ],
    device: Annotated[
        str | None,
        typer.Option(
            help="A GPU (H100), or bandwidth=3.35e12,flops=990e12; left out: measured here."
        ),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, max=_MOST_BATCH, help="Batch sizes.")
    ] = None,
    input_len: Annotated[int, typer.Option(min=1, max=_MOST_TOKENS, help="Prompt tokens.")] = 128,
    output_len: Annotated[
        int, typer.Option(min=2, max=_MOST_TOKENS, help="Generated tokens.")
    ] = 128,
    dtype: Annotated[
        str | None, typer.Option(help="Weights in float32, bfloat16, float16, fp8 or int8.")
    ] = None,
    kv_dtype: Annotated[
        str | None, typer.Option(help="Keys and values, where they differ from the rest.")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="Count this engine's launches too, where their cost is known."),
    ] = None,
    as_json: o.Json = False,
    verbose: o.Verbose = False,
) -> None:
    """Bound prefill and decode of models on a device, and predict how much faster students are."""
    from paretron.cli.output import say_json
    from paretron_profiling.roofline.devices import device_of
    from paretron_profiling.roofline.predict import Load, predictions_json
    from paretron_profiling.roofline.probe import probe_device

    costs = _costs(models, dtype=dtype, kv_dtype=kv_dtype)
    launches = _launches(engine)
    found = device_of(device) if device is not None else probe_device()
    loads = [Load(size, input_len, output_len) for size in sorted(set(batch or (1,)))]
    said = predictions_json(costs, found, loads=loads, launches=launches)
    if as_json:
        say_json(said)
        return
    _show(found, said)
    if launches is not None and found.launch_s is None:
        typer.echo("Launches are left out: what one costs there is not known (launch=SECONDS).")


def _costs(models: list[str], *, dtype: str | None, kv_dtype: str | None) -> dict[str, Costs]:
    """The costs of every model by name; USAGE for an argument that is none."""
    from paretron.artifacts.config import read_config
    from paretron.errors import Code, ParetronError, Problem
    from paretron_profiling.roofline.bounds import BYTES, Costs, Formats

    for option, value in (("--dtype", dtype), ("--kv-dtype", kv_dtype)):
        if value is not None and value not in BYTES:
            fix = f"one of {', '.join(BYTES)}"
            raise ParetronError(Problem(Code.USAGE, f"{value!r} is no format", option, fix))
    found: dict[str, Costs] = {}
    for text in models:
        name, equals, folder = text.partition("=")
        if not equals or not name or not folder or name in found:
            cause = f"{text!r} is not NAME=DIR" if name not in found else f"{name!r} stands twice"
            fix = "teacher=models/llama width=runs/a/stages/width.distill"
            raise ParetronError(Problem(Code.USAGE, cause, fix=fix))
        config = read_config(Path(folder))
        stated = dtype or str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
        formats = Formats.of(stated if stated in BYTES else "bfloat16", kv=kv_dtype)
        found[name] = Costs.of(config, formats=formats)
    return found


def _launches(engine: str | None) -> Launches | None:
    from paretron.errors import Code, ParetronError, Problem
    from paretron_profiling.roofline.bounds import LAUNCHES

    if engine is not None and engine not in LAUNCHES:
        fix = f"one of {', '.join(LAUNCHES)}, or leave it out"
        cause = f"nobody counted what {engine!r} launches"
        raise ParetronError(Problem(Code.USAGE, cause, where="--engine", fix=fix))
    return LAUNCHES[engine] if engine is not None else None


def _show(device: Device, said: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    rates = ", ".join(f"{d} {_flops(r)}" for d, r in device.flop_s.items() if r)
    how = "measured" if device.measured else "as stated"
    console.print(
        f"{device.name} ({how}): {bytes_text(device.bandwidth_bytes_s)}/s; {rates}", markup=False
    )
    shown = Table()
    for head in ("model", "batch", "prefill", "decode step", "tokens/s", "memory"):
        shown.add_column(head, justify="left" if head == "model" else "right")
    for row in said["rows"]:
        memory = bytes_text(row["memory_bytes"])
        shown.add_row(
            Text(row["model"]), str(row["batch"]), _step(row["prefill"]), _step(row["decode"]),
            _rate(row["output_tok_s"]),
            f"{memory}, too much" if row["fits"] is False else memory,
        )  # fmt: skip
    console.print(shown)
    for one in said["speedup"]:
        batches = f"batch {one['batch']} against {one['teacher_batch']}"
        if one["limit"] == "cap":
            batches += ", more would fit"
        console.print(
            f"{one['model']}, {_RULES[one['rule']]}, {batches}: {one['ratio']:.2f} times",
            markup=False,
        )
    console.print(
        "No engine is faster than this; how much of it one attains, `paretron profile` measures.",
        markup=False,
    )


def _step(bound: Mapping[str, Any]) -> str:
    """Time and what limits it: "2.4 ms memory"."""
    seconds = bound["with_launch_s"]
    time = f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
    return f"{time} {bound['limited_by']}"


def _flops(rate: float) -> str:
    return f"{rate / 1e12:.3g} TFLOP/s"


def _rate(tokens_s: float) -> str:
    return f"{tokens_s:,.0f}" if tokens_s >= 100 else f"{tokens_s:.3g}"
