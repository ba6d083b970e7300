"""Engines from a TensorRT-LLM checkpoint, by its own builder: a program of its own environment."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from shlex import quote

from paretron.errors import QUOTED, Code, ParetronError, Problem
from paretron.recipe import Export

BUILDER, NEWEST = "trtllm-build", "1.2.1"
CONTAINER = f"nvcr.io/nvidia/tensorrt-llm/release:{NEWEST}"
ENGINE, SCRIPT, LOG = "engine", "build_engine.sh", "build.log"
_TAIL = 20  # lines of a log


def found() -> str | None:
    """The builder on the path, None where there is none."""
    return shutil.which(BUILDER)


def missing() -> Problem:
    """What to do where an engine is asked for and nothing can build it."""
    return Problem(
        Code.OPTIONAL_MISSING,
        f"{BUILDER} is not on the path, and only it makes an engine",
        where="export.build",
        fix=f"run in the container {CONTAINER} on the GPU that serves, or leave out build: "
        f"{SCRIPT} then holds the command",
    )


def command(export: Export, *, positions: int) -> list[str]:
    """The builder's command line in a checkpoint's folder; the model knows `positions`."""
    serving = export.serving
    longest = serving.max_seq_len or positions
    limits = {
        "max_batch_size": serving.max_batch_size,
        "max_input_len": max(1, longest - 1),  # one token is answered
        "max_seq_len": longest,
        "max_num_tokens": serving.max_num_tokens,
    }
    return [
        *(BUILDER, "--checkpoint_dir", ".", "--output_dir", ENGINE),
        *("--gemm_plugin", "auto"),
        *(word for name, value in limits.items() for word in (f"--{name}", str(value))),
    ]


def write_script(path: Path, lines: Sequence[Sequence[str]], *, about: str) -> None:
    """A shell script that runs command lines from its own folder, whatever folder it is called in.

    A word that begins with a `$` is left for the shell.
    """
    said = (" ".join(w if w.startswith('"$') else quote(w) for w in words) for words in lines)
    text = "\n".join(("#!/bin/sh", f"# {about}", "set -e", 'cd "$(dirname "$0")"', *said))
    path.write_text(text + "\n", "utf-8")
    path.chmod(0o755)


def build(folder: Path, words: Sequence[str]) -> None:
    """Run the builder in a checkpoint's folder; ENGINE with the end of its log when it fails."""
    log = folder / LOG
    with log.open("wb") as out:
        done = subprocess.run(
            words, cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"}, check=False,
        )  # fmt: skip
    engine = folder / ENGINE
    if done.returncode == 0 and engine.is_dir() and any(engine.iterdir()):
        return
    tail = log.read_text("utf-8", errors="replace").splitlines()[-_TAIL:]
    ended = f"ended with {done.returncode}" if done.returncode else "wrote no engine"
    raise ParetronError(
        Problem(
            Code.ENGINE,
            QUOTED.join((f"{BUILDER} {ended}", *(line[:200] for line in tail))),
            fix=f"{BUILDER} must be of TensorRT-LLM {NEWEST} or older, and see the GPU that serves",
        )
    )
