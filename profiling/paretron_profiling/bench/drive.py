"""Running a tool on several models in turns, or reading what it left elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from paretron.errors import Code, ParetronError, Problem, raise_all
from paretron_profiling.bench.condense import profile_of
from paretron_profiling.bench.reading import Reading, Stated
from paretron_profiling.bench.run import LOG, Run, log_end, run_tool
from paretron_profiling.bench.tools import Tool
from paretron_profiling.engines.engine import Engine, EngineSettings, Limits, settings_for
from paretron_profiling.engines.engine import compute_dtype as dtype_of
from paretron_profiling.engines.vllm_environment import Found, kv_cache_bytes
from paretron_profiling.machine import hardware
from paretron_profiling.models import ModelUnderTest
from paretron_profiling.result import ProfileResult, ProfileStopped
from paretron_profiling.schema import CLOSED, OFFLINE, OPEN
from paretron_profiling.servers.server import ServerSession

OnEvent = Callable[[str, Mapping[str, Any]], None]
MIN_REQUESTS = 32
PER_CONCURRENCY = 8
OPEN_IN_FLIGHT = 64  # room that a server has for requests that arrive by themselves
ELSEWHERE = {"cpu": "a machine that the files do not name"}


class Settings(BaseModel):
    """What is measured, and how often; `warmup` counts loads whose times are thrown away.

    `requests` is left out for eight times the concurrency, at least 32.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    tool: str
    mode: Literal["offline", "closed", "open"]
    load: float = Field(gt=0, le=1e6)
    input_len: int = 128
    output_len: int = 128
    requests: int | None = None
    repeats: int = 3
    warmup: int = 1
    seed: int = 0
    timeout_s: float = Field(default=3600.0, ge=1, le=604800)


@dataclass(frozen=True)
class Served:
    """The engine that serves the models to a tool that asks a server."""

    engine: Engine
    settings: EngineSettings

    def open(self, stack: ExitStack, model: ModelUnderTest, run: Run) -> Run:
        """The run against a server of its model, which ends with the stack.

        USAGE for an engine that is no server.
        """
        if CLOSED not in self.engine.modes:
            raise self._no_server()
        session = stack.enter_context(
            self.engine.open(
                run.model,
                settings=settings_for(self.settings, model.name),
                limits=_limits(run, model),
            )
        )
        if not isinstance(session, ServerSession):  # a third party's, whose address we do not know
            raise self._no_server()
        # What our own load client says of itself is not of this load.
        about = {k: v for k, v in session.about.items() if not k.startswith("client")}
        return replace(run, url=session.url, served=session.model, about=about)

    def _no_server(self) -> ParetronError:
        return ParetronError(
            Problem(
                Code.USAGE,
                f"{self.engine.name} is no server that other tools can ask",
                where="--engine",
                fix="vllm_server=PYTHON, or openai with --server NAME=URL",
            )
        )


@dataclass
class Kept:
    """The result files, in the order in which they were made, and what they say."""

    files: dict[str, list[Path]] = field(default_factory=dict)
    readings: dict[str, list[list[Reading]]] = field(default_factory=dict)

    def add(self, name: str, file: Path, *, tool: Tool, stated: Stated) -> None:
        """Read a result file of a model, and keep it."""
        read = tool.read(file, stated)
        self.files.setdefault(name, []).append(file)
        self.readings.setdefault(name, []).append(read)

    def copy(self, folder: Path, *, tool: Tool) -> None:
        """Copy the files into a folder, with the records of their requests."""
        folder.mkdir()
        for name, files in self.files.items():
            for number, file in enumerate(files, 1):
                shutil.copyfile(file, folder / f"{name}-{number}.json")
                if records := tool.records(file):
                    shutil.copyfile(records, folder / f"{name}-{number}.jsonl")


def imported(
    named: Sequence[tuple[str, Path]], *, tool: Tool, stated: Stated
) -> tuple[ProfileResult, Kept]:
    """The profile of result files by model, made elsewhere; several of a model are repeats."""
    kept = Kept()
    for name, file in named:
        kept.add(name, file, tool=tool, stated=stated)
    method = {"order": "read from result files", "prompts": f"made by {tool.name}"}
    readings = [r for files in kept.readings.values() for file in files for r in file]
    gpus = {r.about["gpu"] for r in readings if "gpu" in r.about}
    machine = {**ELSEWHERE, **({"gpu": ", ".join(sorted(gpus))} if gpus else {})}
    return profile_of(kept.readings, rounds=False, hardware=machine, method=method), kept


def driven(
    models: Sequence[ModelUnderTest],
    *,
    tool: Tool,
    python: Path,
    settings: Settings,
    served: Served | None,
    scratch: Path,
    on_event: OnEvent,
) -> tuple[ProfileResult, Kept]:
    """Run a tool on every model, in turns, `repeats` times.

    Servers stay up the whole time, so that the models must fit side by side. ProfileStopped with
    what was measured until then when a run fails.
    """
    vllm = tool.found(python)
    runs = {m.name: _run(m, tool=tool, python=python, settings=settings, vllm=vllm) for m in models}
    raise_all([problem for run in runs.values() for problem in tool.check(run)])
    kept, machine = Kept(), hardware()

    def result(incomplete: str | None = None) -> ProfileResult:
        method = {
            "order": "models in turns, each round in the reverse order of the one before",
            "prompts": f"made by {tool.name}, other ones in each round",
            "decoding": "greedy, of exact length",
            "warmup": settings.warmup,
        }
        about = next(iter(runs.values())).about
        return profile_of(
            kept.readings,
            rounds=True,
            hardware=machine,
            method=method,
            about=about,
            incomplete=incomplete,
        )

    try:
        with ExitStack() as stack:
            if served is not None:
                runs = {m.name: served.open(stack, m, runs[m.name]) for m in models}
            total = settings.repeats * len(models)
            for number in range(settings.repeats):
                for model in models if number % 2 == 0 else models[::-1]:
                    done = sum(map(len, kept.files.values()))
                    on_event("bench.run", {"done": done, "total": total, "unit": "runs"})
                    run = replace(runs[model.name], seed=settings.seed + number)
                    folder = scratch / f"{model.name}-{number}"
                    file = _measured(run, tool=tool, folder=folder, timeout_s=settings.timeout_s)
                    kept.add(model.name, file, tool=tool, stated=run.stated)
    except ParetronError as error:
        if not kept.readings:
            raise
        # The whole cause, with a tool's log, goes with the error.
        incomplete = error.problems[0].cause.splitlines()[0]
        raise ProfileStopped(error, result(incomplete)) from error
    return result(), kept


def requests_of(settings: Settings, tool: Tool) -> int:
    """How many requests a run has: for batches the batch, or some of them one after the other."""
    if settings.mode == OFFLINE:
        return tool.batches * int(settings.load)
    least = PER_CONCURRENCY * int(settings.load) if settings.mode == CLOSED else 0
    return settings.requests or max(MIN_REQUESTS, least)


def _run(
    model: ModelUnderTest, *, tool: Tool, python: Path, settings: Settings, vllm: Found | None
) -> Run:
    folder = model.folders["hf"]
    dtype = dtype_of(folder, settings=EngineSettings(name="vllm"))
    of_a_warmup = 1 if tool.batches > 1 else max(1, round(settings.load))
    run = Run(
        python,
        folder,
        settings.mode,
        settings.load,
        requests=requests_of(settings, tool),
        input_len=settings.input_len,
        output_len=settings.output_len,
        warmup=settings.warmup * of_a_warmup,
        seed=settings.seed,
        dtype=dtype,
        eager=vllm is not None and vllm.is_for_cpu,
        vocab_size=model.facts.vocab_size,
        special_ids=model.facts.special_ids,
        about={"dtype": dtype} | ({"vllm": vllm.vllm, "torch": vllm.torch} if vllm else {}),
    )
    if run.context_len > model.facts.context_len:
        raise ParetronError(
            Problem(
                Code.USAGE,
                f"{run.context_len} tokens, with some for prompts that drift, are more than the "
                f"{model.facts.context_len} that {model.name} can hold",
                fix="shorter --input-len or --output-len",
            )
        )
    return replace(run, kv_bytes=kv_cache_bytes(_limits(run, model)))


def _limits(run: Run, model: ModelUnderTest) -> Limits:
    """Room for the load, and of an open loop for the requests that may be under way at once."""
    batch = min(run.requests, OPEN_IN_FLIGHT) if run.mode == OPEN else int(run.load)
    tokens = batch * run.context_len
    return Limits(batch, run.context_len, tokens * model.facts.kv_bytes_per_token)


def _measured(run: Run, *, tool: Tool, folder: Path, timeout_s: float) -> Path:
    """Run a tool once in a new folder; its result file."""
    folder.mkdir()
    tool.prepare(run, folder)
    run_tool(
        tool.command(run, folder),
        name=tool.name,
        environment=tool.environment(),
        folder=folder,
        timeout_s=timeout_s,
    )
    result = folder / tool.result
    if not result.is_file():
        raise ParetronError(
            Problem(
                Code.ENGINE,
                f"{tool.name} wrote no {tool.result}{log_end(folder / LOG)}",
                where=str(run.model),
                fix="the end of its log above says why",
            )
        )
    return result
