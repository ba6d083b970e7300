"""The tools by name: what each measures, how it is run, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from paretron.errors import Code, ParetronError, Problem
from paretron_profiling.bench import aiperf, trtllm_bench, vllm_bench
from paretron_profiling.bench.reading import Reading, Stated
from paretron_profiling.bench.run import Run
from paretron_profiling.engines.environment import clean_environment, vllm_environment
from paretron_profiling.engines.vllm_environment import Found, probe
from paretron_profiling.schema import CLOSED, OFFLINE, OPEN

ALL = frozenset({OFFLINE, CLOSED, OPEN})
LATENCY_VOCABULARY = 10_000  # vllm bench latency draws token ids below it, whatever the model has


def _nothing(_run: Run, _folder: Path) -> None:
    pass


def _no_records(_result: Path) -> None:
    return None


@dataclass(frozen=True)
class Tool:
    """A benchmark of others.

    `executable` stands beside the interpreter; None where it is vLLM. One process of it measures
    `batches` of an offline load one after the other. `records` finds what lies beside a result.
    """

    name: str
    modes: frozenset[str]
    read: Callable[[Path, Stated], list[Reading]]
    command: Callable[[Run, Path], list[str]]
    result: str
    environment: Callable[[], Mapping[str, str]]
    asks_server: bool = False
    executable: str | None = None
    batches: int = 1
    prepare: Callable[[Run, Path], None] = _nothing
    records: Callable[[Path], Path | None] = _no_records

    def check(self, run: Run) -> list[Problem]:
        """What would keep it from measuring a run."""
        problems = []
        if run.mode not in self.modes:
            problems.append(
                Problem(
                    Code.UNSUPPORTED,
                    f"{self.name} does not measure a load that is {run.mode}",
                    fix=f"it measures {', '.join(sorted(self.modes))}",
                )
            )
        if run.mode == CLOSED and run.requests <= run.load:
            problems.append(
                Problem(
                    Code.USAGE,
                    f"{run.requests} requests with {run.load:g} in flight are all sent at once",
                    where="--requests",
                    fix=f"more --requests, or --batch {run.requests}",
                )
            )
        if self.name == vllm_bench.LATENCY and run.vocab_size < LATENCY_VOCABULARY:
            problems.append(
                Problem(
                    Code.UNSUPPORTED,
                    f"it draws token ids below {LATENCY_VOCABULARY}, and the model knows "
                    f"{run.vocab_size}",
                    where=str(run.model),
                    fix=f"measure with {vllm_bench.THROUGHPUT}, or by `paretron profile`",
                )
            )
        return problems

    def found(self, python: Path) -> Found | None:
        """The vLLM that is with an interpreter, None for other tools.

        OPTIONAL_MISSING where the tool is not there.
        """
        if self.executable is not None:
            if not (python.parent / self.executable).is_file():
                raise self._missing(f"no {self.executable} beside {python}")
            return None
        found = probe(python)
        if found is None or not found.vllm:
            raise self._missing(f"{python} is no interpreter that has vLLM")
        return found

    def _missing(self, cause: str) -> ParetronError:
        fix = f"name the interpreter of the environment that {self.name} is installed in"
        return ParetronError(Problem(Code.OPTIONAL_MISSING, cause, where="--python", fix=fix))


TOOLS: Mapping[str, Tool] = {
    tool.name: tool
    for tool in (
        Tool(
            vllm_bench.SERVE,
            ALL,
            vllm_bench.read_serve,
            vllm_bench.serve_command,
            vllm_bench.RESULT,
            vllm_environment,
            asks_server=True,
        ),
        Tool(
            vllm_bench.THROUGHPUT,
            frozenset({OFFLINE}),
            vllm_bench.read_throughput,
            vllm_bench.throughput_command,
            vllm_bench.RESULT,
            vllm_environment,
        ),
        Tool(
            vllm_bench.LATENCY,
            frozenset({OFFLINE}),
            vllm_bench.read_latency,
            vllm_bench.latency_command,
            vllm_bench.RESULT,
            vllm_environment,
            batches=8,
        ),
        Tool(
            trtllm_bench.THROUGHPUT,
            frozenset({OFFLINE, CLOSED}),
            trtllm_bench.read_report,
            trtllm_bench.throughput_command,
            trtllm_bench.RESULT,
            clean_environment,
            executable=trtllm_bench.NAME,
            prepare=trtllm_bench.write_prompts,
        ),
        Tool(
            trtllm_bench.LATENCY,
            frozenset({CLOSED}),
            trtllm_bench.read_report,
            trtllm_bench.latency_command,
            trtllm_bench.RESULT,
            clean_environment,
            executable=trtllm_bench.NAME,
            prepare=trtllm_bench.write_prompts,
        ),
        Tool(
            aiperf.NAME,
            ALL,
            aiperf.read_run,
            aiperf.command,
            aiperf.SUMMARY,
            aiperf.environment,
            asks_server=True,
            executable=aiperf.NAME,
            records=aiperf.records_beside,
        ),
    )
}
