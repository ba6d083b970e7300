"""vLLM's OpenAI server, started by us under the interpreter that the recipe names."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from paretron.errors import Code, ParetronError, Problem
from paretron_profiling.engines.engine import EngineSettings, Limits, compute_dtype
from paretron_profiling.engines.environment import vllm_environment
from paretron_profiling.engines.vllm_environment import (
    MEMORY_SHARE,
    Found,
    interpreter,
    interpreter_problems,
    kv_cache_bytes,
)
from paretron_profiling.schema import CLOSED, OFFLINE, OPEN
from paretron_profiling.servers.server import (
    HOST,
    Command,
    RunningServer,
    ServerSession,
    running,
    session_of,
    stated_port,
)

_DEVICE = re.compile(r"device_config=(?:device\(type=')?(\w+)")  # of vLLM's own line at its start


class VllmServer:
    """Serves a Hugging Face checkpoint as users serve it, and is asked over HTTP."""

    name = "vllm_server"
    wants = "hf"
    modes = frozenset({OFFLINE, CLOSED, OPEN})
    session_bytes = 2 << 30
    largest_batch: int | None = None

    def check(self, settings: EngineSettings) -> list[Problem]:
        """Whether `python` names an interpreter that has a recent enough vLLM."""
        return interpreter_problems(settings)

    @contextmanager
    def open(
        self, model_dir: Path, *, settings: EngineSettings, limits: Limits
    ) -> Iterator[ServerSession]:
        """Start a server and wait until it answers; all of its processes end with the context."""
        found = interpreter(settings)
        dtype = compute_dtype(model_dir, settings=settings)
        # A name that no other server on this machine has: vLLM shares its port with another vLLM.
        served = f"paretron-{secrets.token_hex(4)}"
        command = _command(
            model_dir, settings=settings, limits=limits, found=found, dtype=dtype, served=served
        )
        port, where = stated_port(settings)
        with running(command, name=self.name, port=port, where=where) as server:
            if served not in server.model_ids:
                cause = f"another server answers at {server.url}"
                raise ParetronError(Problem(Code.ENGINE, cause, where=where, fix="another port"))
            about = _about(server, found=found, dtype=dtype, environment=command.environment)
            with session_of(server, model=served, about=about) as session:
                yield session


def _command(
    model_dir: Path,
    *,
    settings: EngineSettings,
    limits: Limits,
    found: Found,
    dtype: str,
    served: str,
) -> Command:
    def on_port(port: int) -> list[str]:
        return [
            str(settings.python), "-I", "-m", "vllm.entrypoints.openai.api_server",
            "--model", str(model_dir.resolve()), "--served-model-name", served,
            "--host", HOST, "--port", str(port),
            "--dtype", dtype, "--load-format", "safetensors", "--seed", "0",
            "--max-model-len", str(limits.context_len), "--max-num-seqs", str(limits.batch),
            "--kv-cache-memory-bytes", str(kv_cache_bytes(limits)),
            "--gpu-memory-utilization", str(MEMORY_SHARE),
            # Each prompt computed in full, and sampled by nothing that the checkpoint says.
            "--no-enable-prefix-caching", "--generation-config", "vllm",
            "--disable-log-stats", "--disable-uvicorn-access-log",
            *(["--enforce-eager"] if found.is_for_cpu else []),
        ]  # fmt: skip

    return Command(on_port, vllm_environment())


def _about(
    server: RunningServer, *, found: Found, dtype: str, environment: Mapping[str, str]
) -> dict[str, str]:
    device = _DEVICE.search(server.log_text())
    return {
        "vllm": found.vllm,
        "torch": found.torch,
        "mode": f"{'eager' if found.is_for_cpu else 'compiled, CUDA graphs'}, OpenAI server",
        "dtype": dtype,
        "OMP_WAIT_POLICY": environment["OMP_WAIT_POLICY"],
        "OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", "not set"),
        **({"device": device[1]} if device else {}),
    }


ENGINE = VllmServer()
