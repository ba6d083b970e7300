"""vLLM on the CPU, in its own interpreter: a program asked once, or its OpenAI server."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

HEALTHY_S = 400  # on a busy machine it takes minutes to start


def environment(home: Path) -> dict[str, str]:
    """That of a process that has vLLM, with nothing of ours and nothing of a hub's."""
    drop = ("PYTHON", "VLLM_", "HF_TOKEN", "HUGGING_FACE")
    return {k: v for k, v in os.environ.items() if not k.startswith(drop)} | {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "HOME": str(home),
    }


def answer(python: str, program: Path, request: dict[str, Any], *, folder: Path) -> dict[str, Any]:
    """What a program of ours that imports vLLM writes to `answer`, a file of the request."""
    said = folder / "answer.json"
    done = subprocess.run(
        [python, "-I", str(program), json.dumps(request | {"answer": str(said)})],
        env=environment(folder) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        cwd=folder, timeout=600, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    found: dict[str, Any] = json.loads(said.read_text())
    return found


@contextmanager
def served(python: str, model: Path, *, dtype: str, home: Path) -> Iterator[str]:
    """Serve a checkpoint in `dtype`; the server's address. Its whole process group ends with it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = home / "server.log"
    with log.open("w") as file:
        server = subprocess.Popen(
            [python, "-I", "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
             "--served-model-name", "student", "--host", "127.0.0.1", "--port", str(port),
             "--dtype", dtype, "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "4"],
            env=environment(home), cwd=home, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        _wait(server, address, log)
        yield address
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            server.wait(60)
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait(10)


def greedy(address: str, prompts: Sequence[Sequence[int]], *, steps: int) -> list[list[int]]:
    """The tokens that the server gives for prompts of tokens."""
    asked = {
        "model": "student", "prompt": [list(p) for p in prompts], "max_tokens": steps,
        "temperature": 0, "ignore_eos": True, "return_token_ids": True,
    }  # fmt: skip
    request = urllib.request.Request(
        f"{address}/v1/completions",
        data=json.dumps(asked).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as said:
        choices: list[dict[str, Any]] = json.load(said)["choices"]
    return [list(c["token_ids"]) for c in sorted(choices, key=lambda c: int(c["index"]))]


def _wait(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    end = time.monotonic() + HEALTHY_S
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()[-3000:]
        with suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
            return
        time.sleep(0.5)
    raise AssertionError(f"not healthy after {HEALTHY_S} s: {log.read_text()[-3000:]}")
