"""Captures in processes of their own, one or two, killed where a test asks for it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Mapping
from pathlib import Path

from paretron.artifacts.manifest import Provenance
from paretron.distill.capture.stage import capture
from paretron.recipe import Distill
from paretron.recipe.training import Loss

SEQ_LEN = 32


def exit_codes(work: Path, out: Path, *, killed_after: int = 0, processes: int = 1) -> list[int]:
    """What the processes of a capture end with; one is killed after so many files, 0 for never."""
    # They fork from a process that has imported everything and started no thread.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = [
        context.Process(target=_capture, args=(work, out, killed_after, rank, processes, port))
        for rank in range(processes)
    ]
    for process in group:
        process.start()
    for process in group:
        process.join()
    return [int(process.exitcode or 0) for process in group]


def _capture(work: Path, out: Path, killed_after: int, rank: int, size: int, port: int) -> None:
    if size > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
    files = 0

    def on_event(kind: str, fields: Mapping[str, object]) -> None:
        nonlocal files
        files += kind == "progress"
        if files == killed_after:
            os.kill(os.getpid(), signal.SIGKILL)

    capture(
        work / "teacher",
        work / "tokens",
        kind="top_k",
        settings=Distill(
            tokens=8 * SEQ_LEN, global_batch=8, micro_batch=4, dtype="float32", loss=Loss(top_k=64)
        ),
        seq_len=SEQ_LEN,
        apart=False,
        out=out,
        state=out.with_name(f".{out.name}.state"),
        provenance=Provenance(kind="capture", stamp="TEST"),
        file_bytes=100_000,
        on_event=on_event,
    )
