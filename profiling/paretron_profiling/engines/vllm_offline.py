"""vLLM in a process of its own, under the interpreter that the recipe names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from paretron.errors import Code, ParetronError, Problem, raise_all
from paretron_profiling.engines.engine import (
    EngineSettings,
    Limits,
    compute_dtype,
)
from paretron_profiling.engines.environment import vllm_environment
from paretron_profiling.engines.vllm_environment import (
    MEMORY_SHARE,
    interpreter_problems,
    kv_cache_bytes,
)
from paretron_profiling.engines.worker import Worker, WorkerFailed
from paretron_profiling.schema import OFFLINE, Sample

START_TIMEOUT_S = 600.0
ANSWER_TIMEOUT_S = 1800.0

WORKER = Path(__file__).with_name("vllm_worker.py")


class VllmOffline:
    """Runs a Hugging Face checkpoint through vLLM's engine, stepped by us, without a server.

    With `quantization` ("fp8") vLLM rounds the blocks' weights as it loads them, and activations as
    it runs; it has a name of its own, so that both can stand in one profile.
    """

    wants = "hf"
    modes = frozenset({OFFLINE})
    session_bytes = 1 << 30
    largest_batch: int | None = None

    def __init__(self, name: str = "vllm", *, quantization: str | None = None) -> None:
        self.name, self._quantization = name, quantization

    def check(self, settings: EngineSettings) -> list[Problem]:
        """Whether `python` names an interpreter that has a recent enough vLLM, and its GPU."""
        problems = interpreter_problems(settings)
        if not problems and self._quantization and shutil.which("nvidia-smi") is None:
            problems.append(
                Problem(
                    Code.DEVICE,
                    f"{self.name} needs an NVIDIA GPU, and no driver is here",
                    where=f"profile.engines: {self.name}",
                    fix="run it where there is one, or profile an FP8 export with `vllm`",
                )
            )
        return problems

    @contextmanager
    def open(
        self, model_dir: Path, *, settings: EngineSettings, limits: Limits
    ) -> Iterator[VllmSession]:
        """Start a worker and wait until its model is loaded; the worker ends with the context."""
        raise_all(self.check(settings))
        given = {
            "model": str(model_dir.resolve()),
            "dtype": compute_dtype(model_dir, settings=settings),
            "batch": limits.batch,
            "context_len": limits.context_len,
            "kv_bytes": kv_cache_bytes(limits),
            "memory_share": MEMORY_SHARE,
            "quantization": self._quantization,
        }
        with TemporaryDirectory(prefix="paretron-vllm-", ignore_cleanup_errors=True) as scratch:
            worker = Worker(
                [str(settings.python), "-I", str(WORKER)],
                argument=json.dumps(given | {"scratch": scratch}),
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
            (0.0,) * len(prompts),
            tuple(answer["first_token_s"]),
            tuple(answer["finish_s"]),
            tuple(answer["gaps_s"]),
            tokens=tuple(map(tuple, answer["tokens"])),
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


def _environment() -> dict[str, str]:
    """That of vLLM in one process: each step costs less than through vLLM's own worker processes.

    On a small model by a third; and nothing can be left behind.
    """
    return {**vllm_environment(), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


ENGINE = VllmOffline()
FP8 = VllmOffline("vllm_fp8", quantization="fp8")
