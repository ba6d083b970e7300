"""TensorRT-LLM's OpenAI server on a `trtllm` export, under the interpreter that the recipe names.

It needs a GPU and was never run where this was written: the command line is by the documentation
of TensorRT-LLM 1.2, and the protocol is the one of the other servers.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from paretron.errors import Code, ParetronError, Problem, raise_all
from paretron_profiling.engines.engine import EngineSettings, Limits, compute_dtype
from paretron_profiling.engines.environment import clean_environment
from paretron_profiling.schema import CLOSED, OFFLINE, OPEN
from paretron_profiling.servers.server import (
    HOST,
    Command,
    ServerSession,
    running,
    session_of,
    stated_port,
)

# What the `trtllm` export holds.
MODEL, CONFIG = "model", "llm_config.yaml"
COMMAND = "trtllm-serve"
_LIMITS = {"max_batch_size": "batch", "max_seq_len": "context_len"}


class TrtllmServer:
    """Serves an export as `serve.sh` in it does; untried where there is no GPU."""

    name = "trtllm"
    wants = "trtllm"
    modes = frozenset({OFFLINE, CLOSED, OPEN})
    # The export's settings give the KV cache a share of all that is free: no two fit together.
    session_bytes = 1 << 50
    largest_batch: int | None = None

    def check(self, settings: EngineSettings) -> list[Problem]:
        """Whether trtllm-serve is beside `python`, or on the path, and a GPU here."""
        problems = []
        if settings.dtype is not None:
            problems.append(
                Problem(
                    Code.RECIPE_VALUE,
                    "trtllm runs the dtype that the export has",
                    where="profile.engines: trtllm: dtype",
                    fix="state the dtype at the export instead",
                )
            )
        if _found(settings) is None:
            beside = f"beside {settings.python}" if settings.python else "on the path"
            problems.append(
                Problem(
                    Code.OPTIONAL_MISSING,
                    f"no {COMMAND} {beside}",
                    where="profile.engines: trtllm: python",
                    fix="name the interpreter of an environment that has tensorrt_llm >= 1.2",
                )
            )
        elif shutil.which("nvidia-smi") is None:
            problems.append(
                Problem(
                    Code.DEVICE,
                    "TensorRT-LLM needs an NVIDIA GPU, and no driver is here",
                    where="profile.engines: trtllm",
                    fix="run it where there is one, or leave it out",
                )
            )
        return problems

    @contextmanager
    def open(
        self, model_dir: Path, *, settings: EngineSettings, limits: Limits
    ) -> Iterator[ServerSession]:
        """Start a server and wait until it answers; all of its processes end with the context."""
        raise_all([*self.check(settings), *_too_small(model_dir / CONFIG, limits)])
        command = _command(model_dir, settings)
        port, where = stated_port(settings)
        with running(command, name=self.name, port=port, where=where) as server:
            about = {
                "tensorrt_llm": _version(settings),
                "mode": "PyTorch backend, OpenAI server",
                "dtype": compute_dtype(model_dir / MODEL, settings=settings),
                "device": "cuda",
            }
            with session_of(server, model=server.model_ids[0], about=about) as session:
                yield session


def _found(settings: EngineSettings) -> Path | None:
    """The command, beside the interpreter that the recipe names, or else on the path."""
    if settings.python is None:
        found = shutil.which(COMMAND)
        return Path(found) if found else None
    beside = settings.python.parent / COMMAND
    return beside if beside.is_file() else None


def _version(settings: EngineSettings) -> str:
    """TensorRT-LLM's version beside the command; "unknown" where no interpreter is named."""
    ask = "import importlib.metadata as m; print(m.version('tensorrt_llm'))"
    try:
        command = [str(settings.python), "-I", "-c", ask]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def _command(model_dir: Path, settings: EngineSettings) -> Command:
    model, config = (str((model_dir / name).resolve()) for name in (MODEL, CONFIG))

    def on_port(port: int) -> list[str]:
        at = ["--host", HOST, "--port", str(port), "--backend", "pytorch"]
        return [str(_found(settings)), model, *at, "--config", config]

    return Command(on_port, clean_environment())


def _too_small(config: Path, limits: Limits) -> list[Problem]:
    """Where the export's server would take less than is to be measured."""
    try:
        settings = YAML(typ="safe", pure=True).load(config.read_text("utf-8"))
    except (OSError, YAMLError, UnicodeDecodeError) as error:
        cause = f"no settings of a server: {error}"
        raise ParetronError(Problem(Code.INPUT_CONFIG, cause, where=str(config))) from error
    stated = settings if isinstance(settings, dict) else {}
    return [
        Problem(
            Code.RECIPE_VALUE,
            f"the export was made for {key} {stated.get(key)}, not {getattr(limits, needed)}",
            where=str(config),
            fix=f"export with serving: {{{key}: {getattr(limits, needed)}}}, or measure less",
        )
        for key, needed in _LIMITS.items()
        if not isinstance(stated.get(key), int) or stated[key] < getattr(limits, needed)
    ]


ENGINE = TrtllmServer()
