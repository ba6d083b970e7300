"""What an engine is to the profiler, so that a third party can add one.

An engine is an object registered under the entry-point group `paretron.engines`; it imports its
third-party package only when used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from paretron.errors import Code, ParetronError, Problem
from paretron.recipe import Engine as EngineSettings
from paretron.recipe.limits import unserved
from paretron_profiling.schema import Sample

__all__ = [
    "Engine",
    "EngineSettings",
    "Limits",
    "Pace",
    "Server",
    "Session",
    "compute_dtype",
    "own_process_only",
    "settings_for",
]


@dataclass(frozen=True)
class Limits:
    """The largest load a session will see; engines reserve their KV cache by it."""

    batch: int
    context_len: int
    kv_bytes: int


@dataclass(frozen=True)
class Pace:
    """How requests reach a server: CLOSED keeps `load` in flight, OPEN sends `load` a second.

    Arrivals of an open loop are a Poisson process, the same for the same seed.
    """

    mode: str
    load: float
    seed: int


class Session(Protocol):
    """A loaded model that generates greedily."""

    @property
    def about(self) -> Mapping[str, str]:
        """What the engine runs with: version, device, dtype, threads, mode."""

    @property
    def pid(self) -> int | None:
        """The process that it runs in, with its children; None where that is not known here."""

    def generate(self, prompts: Sequence[Sequence[int]], output_len: int) -> Sample:
        """Send all prompts [batch][input_len] at once and decode output_len tokens each.

        Greedy, never ended by an end-of-sequence token. The sample carries times and tokens.
        ParetronError(ENGINE) when the engine fails.
        """


class Server(Session, Protocol):
    """A session that answers requests as they come."""

    def serve(self, prompts: Sequence[Sequence[int]], output_len: int, *, pace: Pace) -> Sample:
        """Send the prompts at a pace, each answered with output_len tokens as they are made.

        A request that fails is counted in the sample's failures. ParetronError(ENGINE) when the
        server is gone.
        """


class Engine(Protocol):
    """A way to run a model."""

    @property
    def name(self) -> str:
        """The name in recipes."""

    @property
    def wants(self) -> str:
        """The kind of export it runs: "hf" or "onnx"."""

    @property
    def modes(self) -> frozenset[str]:
        """The loads it can be put under; those besides OFFLINE need sessions that are a Server."""

    @property
    def session_bytes(self) -> int:
        """Memory that one session takes besides weights and KV cache, roughly."""

    @property
    def largest_batch(self) -> int | None:
        """The largest batch that the engine takes; None when only memory limits it."""

    def check(self, settings: EngineSettings) -> list[Problem]:
        """What would keep the engine from running, found without loading it (under a second)."""

    def open(
        self, model_dir: Path, *, settings: EngineSettings, limits: Limits
    ) -> AbstractContextManager[Session]:
        """Load a model; leaving the context frees it. ParetronError(ENGINE) when it fails."""


def compute_dtype(model_dir: Path, *, settings: EngineSettings) -> str:
    """The torch name of the dtype to run in: the recipe's, or else the checkpoint's own."""
    from paretron.artifacts.jsonfile import read_object

    # Of a quantised export, too: its table refuses it as a teacher, an engine runs it.
    config = read_object(model_dir / "config.json", code=Code.INPUT_CONFIG)
    return str(settings.dtype or config.get("dtype") or config.get("torch_dtype") or "float32")


def settings_for(settings: EngineSettings, model: str) -> EngineSettings:
    """The settings with the addresses and ports of one model alone, as its session needs them.

    RECIPE_VALUE when the recipe names servers, but none for this model.
    """
    if settings.servers and model not in settings.servers:
        raise ParetronError(unserved(settings, model))
    return settings.model_copy(
        update={
            "servers": {k: v for k, v in settings.servers.items() if k == model},
            "ports": {k: v for k, v in settings.ports.items() if k == model},
        }
    )


def own_process_only(settings: EngineSettings) -> list[Problem]:
    """The problem of an interpreter named for an engine that runs in this process."""
    if settings.python is None:
        return []
    return [
        Problem(
            Code.RECIPE_VALUE,
            f"{settings.name} runs in Paretron's own process",
            where=f"profile.engines: {settings.name}: python",
            fix="leave `python` out",
        )
    ]
