"""Other tools' benchmarks as an artifact: profile.json, and the tools' own files beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from paretron.artifacts.jsonfile import dump
from paretron.artifacts.manifest import Provenance
from paretron.artifacts.staging import refuse_existing, refuse_overlap, staged
from paretron.errors import Code, ParetronError, Problem
from paretron.plugins import ENGINES, find_plugin
from paretron.recipe import Engine
from paretron.run.events import OnEvent
from paretron.run.measure import PROFILE, engines_by_name, models_by_name
from paretron.run.single import provenance_of
from paretron_profiling.bench.drive import Kept, Served, Settings, driven, imported
from paretron_profiling.bench.reading import Stated
from paretron_profiling.bench.tools import TOOLS, Tool
from paretron_profiling.models import ModelUnderTest
from paretron_profiling.result import ProfileResult, ProfileStopped
from paretron_profiling.schema import CLOSED, OFFLINE, OPEN

RAW = "raw"
DEFAULT_ENGINE = "vllm_server"
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")


class Imported(BaseModel):
    """What was said about result files that were made elsewhere."""

    model_config = ConfigDict(frozen=True)

    tool: str
    stated: dict[str, Any]


def tool_named(name: str) -> Tool:
    """A tool; USAGE for another name."""
    if name not in TOOLS:
        raise _usage(f"{name!r} is no tool that is known here", f"one of {', '.join(TOOLS)}")
    return TOOLS[name]


def load_named(
    *, batch: int | None, concurrency: int | None, rate: float | None
) -> tuple[str, float] | None:
    """The one load that was stated; None without any, USAGE for several."""
    stated = {OFFLINE: batch, CLOSED: concurrency, OPEN: rate}
    found = [(mode, float(load)) for mode, load in stated.items() if load is not None]
    if len(found) > 1:
        raise _usage("one load at a time", "one of --batch, --concurrency and --rate")
    return found[0] if found else None


def either(models: Sequence[str], results: Sequence[str]) -> None:
    """USAGE unless there is something to measure, or something to read, and not both."""
    if bool(models) == bool(results):
        raise _usage(
            "either checkpoints to measure, or result files to read",
            "NAME=DIR..., or --from NAME=FILE...",
        )


def stated_of(
    load: tuple[str, float] | None,
    *,
    input_len: int | None,
    output_len: int | None,
    warmup: int | None,
) -> Stated:
    """What was said of result files."""
    mode, amount = load or (None, None)
    return Stated(mode, amount, input_len, output_len, warmup)


def no_interpreter() -> ParetronError:
    """What is said to whoever names no interpreter."""
    return _usage("a tool that is run needs an interpreter that has it", "--python PYTHON")


def settings_of(tool: str, load: tuple[str, float] | None, **given: float | None) -> Settings:
    """What is to be measured; USAGE where the load is not said, or something makes no sense."""
    if load is None:
        raise _usage("a tool that is run needs a load", "--batch, --concurrency or --rate")
    stated = {name: value for name, value in given.items() if value is not None}
    try:
        return Settings.model_validate({"tool": tool, "mode": load[0], "load": load[1]} | stated)
    except ValidationError as error:
        first = error.errors()[0]
        raise _usage(f"{first['loc'][0]}: {first['msg']}", "`paretron bench --help`") from error


def models_and_server(
    named: Sequence[str],
    *,
    tool: Tool,
    engine: str | None,
    servers: Sequence[str],
    python: Path,
) -> tuple[list[ModelUnderTest], Served | None]:
    """The models of `NAME=DIR` arguments, and what serves them to a tool that asks a server.

    USAGE for a name that is given twice or would not do for a file, an engine that takes no
    checkpoint, and a server for a tool that asks none.
    """
    if (engine or servers) and not tool.asks_server:
        raise _usage(f"{tool.name} loads the models itself", "leave --engine and --server out")
    models = models_by_name(named, engines=())
    for model in models:
        if not _NAME.fullmatch(model.name) or sum(m.name == model.name for m in models) > 1:
            raise _usage(f"{model.name!r} is no name, or given twice", "teacher=DIR width=DIR")
    if not tool.asks_server:
        return models, None
    default = "openai" if servers else f"{DEFAULT_ENGINE}={python}"
    (found,) = engines_by_name([engine or default], servers=servers)
    settings = Engine.model_validate(found)
    plugin = find_plugin(ENGINES, settings.name, where="--engine")
    if plugin.wants != "hf":
        raise _usage(
            f"{settings.name} does not serve a checkpoint",
            "start that server, and name it: --server NAME=URL",
        )
    return models, Served(plugin, settings)


def publish_import(
    results: Sequence[str], *, tool: Tool, stated: Stated, out: Path, overwrite: bool
) -> None:
    """Read the result files of `NAME=FILE` arguments, and publish what they say."""
    refuse_existing(out, overwrite=overwrite)
    result, kept = imported(_files_by_name(results), tool=tool, stated=stated)
    said = Imported(tool=tool.name, stated=asdict(stated))
    provenance = provenance_of("bench", {}, {"bench": said})
    _publish(result, kept, tool=tool, out=out, provenance=provenance, overwrite=overwrite)


def publish_bench(
    models: Sequence[ModelUnderTest],
    *,
    tool: Tool,
    python: Path,
    settings: Settings,
    served: Served | None,
    out: Path,
    overwrite: bool,
    on_event: OnEvent,
) -> None:
    """Run a tool on the models in turns, and publish what it says.

    When it fails in the middle, what it said until then is kept beside `out`, marked incomplete.
    """
    folders = {m.name: m.folders["hf"] for m in models}
    for folder in folders.values():
        refuse_overlap(out, folder)
    refuse_existing(out, overwrite=overwrite)
    provenance = provenance_of("bench", folders, {"bench": settings}, seed=settings.seed)
    partial = out.with_name(f"{out.name}-incomplete.json")
    with TemporaryDirectory(prefix="paretron-bench-", ignore_cleanup_errors=True) as scratch:
        try:
            result, kept = driven(
                models,
                tool=tool,
                python=python.absolute(),
                settings=settings,
                served=served,
                scratch=Path(scratch),
                on_event=on_event,
            )
        except ProfileStopped as stopped:
            partial.parent.mkdir(parents=True, exist_ok=True)
            dump(partial, stopped.partial.to_json())
            on_event("note", {"message": f"measured until then: {partial}"})
            raise
        _publish(result, kept, tool=tool, out=out, provenance=provenance, overwrite=overwrite)
    partial.unlink(missing_ok=True)


def _files_by_name(named: Sequence[str]) -> list[tuple[str, Path]]:
    found = []
    for text in named:
        name, equals, file = text.partition("=")
        if not equals or not _NAME.fullmatch(name) or not Path(file).is_file():
            raise _usage(
                f"{text!r} is not NAME=FILE with a file that is there",
                "--from teacher=base.json --from width=width.json",
            )
        found.append((name, Path(file)))
    return found


def _publish(
    result: ProfileResult,
    kept: Kept,
    *,
    tool: Tool,
    out: Path,
    provenance: Provenance,
    overwrite: bool,
) -> None:
    with staged(out, provenance=provenance, overwrite=overwrite) as folder:
        kept.copy(folder / RAW, tool=tool)
        dump(folder / PROFILE, result.to_json())


def _usage(cause: str, fix: str) -> ParetronError:
    return ParetronError(Problem(Code.USAGE, cause, fix=fix))
