"""`paretron inspect`: what a checkpoint is, what can become of it, and who will take it."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paretron.cli import options as o
from paretron.cli.output import bytes_text, say_json, say_notices

if TYPE_CHECKING:
    from paretron.artifacts.serving import Served
    from paretron.plan.inspection import Inspection, Prunable

_HASHES = {
    "verified": "manifest.json agrees with every byte",
    "unverified": "unverified: --verify compares every byte with manifest.json",
    "unknown": "unverified: there is no manifest.json to compare with",
}


def inspect(
    model: o.ModelFolder,
    verify: Annotated[
        bool, typer.Option("--verify", help="Also hash every file (reads all of it).")
    ] = False,
    as_json: o.Json = False,
    verbose: o.Verbose = False,
) -> None:
    """Show a checkpoint's family, axes, counts, integrity, what can be pruned, and who takes it."""
    from paretron.plan.inspection import inspect_model

    found = inspect_model(model, hashes=verify)
    say_notices(found.checkpoint.notices)
    if as_json:
        say_json(found.as_json())
        return
    _show(model, found)


def _show(model: Path, found: Inspection) -> None:
    facts, checkpoint = found.facts, found.checkpoint
    files = {e.file for e in checkpoint.entries.values()}
    tied = checkpoint.config.get("tie_word_embeddings", False)
    typer.echo(f"{model}: {checkpoint.family.architecture}")
    _line("parameters", f"{facts.params} ({facts.non_embedding_params} without embeddings)")
    if facts.active_params != facts.params:
        _line("active", f"{facts.active_params} for a token")
    _line("weights", f"{bytes_text(facts.weight_bytes)} in {len(files)} file(s)")
    _line("dtype", ", ".join(f"{d} ({bytes_text(n)})" for d, n in found.dtypes.items()))
    _line("KV cache", f"{bytes_text(facts.kv_bytes_per_token)} a token")
    _line("axes", ", ".join(f"{axis} {n}" for axis, n in facts.sizes.items()))
    _line("embeddings", "tied: the head is the embedding" if tied else "untied")
    _line("tokenizer", "here" if found.tokenizer else "missing")
    _line("headers", "names, shapes and offsets agree with the family's table")
    _line("hashes", _HASHES[found.hashes])
    typer.echo("  can be pruned")
    for axis, prunable in found.prunable.items():
        _line(f"  {axis}", _prunable(prunable))
    typer.echo("  is taken by")
    for served in found.engines:
        _line(f"  {served.engine}", _served(served))


def _prunable(axis: Prunable) -> str:
    if axis.now == axis.least:
        return f"{axis.now}, the least there can be"
    text = f"{axis.now} down to {axis.least}"
    if axis.multiple_of > 1:
        text += f" in multiples of {axis.multiple_of}"
    if axis.multiple_of < axis.advised_multiple_of <= axis.now:
        text += f"; multiples of {axis.advised_multiple_of} are fastest"
    return text


def _served(served: Served) -> str:
    text = served.loads if not served.reason else f"{served.loads}: {served.reason}"
    if len(served.tensor_parallel) > 1:
        text += f"; over {', '.join(map(str, served.tensor_parallel))} devices"
    return text


def _line(name: str, text: str) -> None:
    indent = " " * 24
    typer.echo(textwrap.fill(text, 96, initial_indent=f"  {name:<22}", subsequent_indent=indent))
