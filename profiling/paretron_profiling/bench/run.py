"""One run of another tool: what it is to measure, and its process, which never outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from paretron.errors import QUOTED, Code, ParetronError, Problem
from paretron_profiling.bench.reading import Stated

KEEPER = Path(__file__).with_name("keeper.py")
LOG = "log.txt"
LOG_LINES = 20
LOG_BYTES = 1 << 16


@dataclass(frozen=True)
class Run:
    """A workload to be measured by a tool on one model.

    `python` has the tool. `url` and `served` are where, and under which name, the model is served,
    for tools that ask a server; `kv_bytes`, `dtype` and `eager` are for those that load it, and
    `about` is what is known of what runs it. Answers end at `output_len` tokens and not before.
    `warmup` counts requests (of `vllm bench latency`, batches) whose times are thrown away.
    """

    python: Path
    model: Path
    mode: str
    load: float
    requests: int
    input_len: int
    output_len: int
    warmup: int
    seed: int
    url: str = ""
    served: str = ""
    dtype: str = ""
    kv_bytes: int = 0
    eager: bool = False
    vocab_size: int = 0
    special_ids: frozenset[int] = frozenset()
    about: Mapping[str, str] = field(default_factory=dict)

    @property
    def context_len(self) -> int:
        """Room for a request, and for the tokens by which prompts of other tools drift."""
        return self.input_len + self.output_len + max(16, self.input_len // 20)

    @property
    def stated(self) -> Stated:
        """What the result file may leave out."""
        return Stated(self.mode, self.load, self.input_len, self.output_len, self.warmup)


def run_tool(
    command: Sequence[str],
    *,
    name: str,
    environment: Mapping[str, str],
    folder: Path,
    timeout_s: float,
) -> None:
    """Run a tool to its end in `folder`, in a process group that ends with it, and with us.

    What it prints goes to log.txt there. ParetronError(ENGINE), with the end of that, when it
    fails or takes longer.
    """
    log = folder / LOG
    with log.open("wb") as out, subprocess.Popen(
        [sys.executable, "-I", str(KEEPER), *command], stdin=subprocess.PIPE, stdout=out,
        stderr=subprocess.STDOUT, env=dict(environment), cwd=folder, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            status: int | None = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with suppress(ProcessLookupError, PermissionError):  # the group is empty
                os.killpg(process.pid, signal.SIGKILL)
    if status == 0:
        return
    if status is None:
        how = f"took longer than {timeout_s:g} s"
    else:
        how = f"was killed by signal {-status}" if status < 0 else f"exited with {status}"
    raise ParetronError(
        Problem(
            Code.ENGINE,
            f"{name} {how}{log_end(log)}",
            where=command[0],
            fix="the end of its log above says why",
        )
    )


def log_end(log: Path) -> str:
    """The last lines of a log, to be quoted."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    return "".join(f"{QUOTED}{line[:300]}" for line in lines[-LOG_LINES:])
