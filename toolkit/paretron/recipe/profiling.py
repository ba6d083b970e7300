"""The profile section: engines, the load they are put under, and what counts as fast enough."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from paretron.recipe.base import NAMEABLE, NUMBER, Count, Name, Positive, Section

_Amount = Annotated[float, NUMBER, Field(gt=0, le=1e9)]
_Port = Annotated[int, NUMBER, Field(ge=1, le=65535)]
Url = Annotated[str, Field(max_length=1000, pattern=r"^https?://[^\s/@]+(/[^\s@]*)?$")]


class Engine(Section):
    """A serving engine; `python` names the interpreter of one that has its own environment.

    `servers` holds the address of one that runs already, by the name of the model that it serves.
    One that we start listens on a free port of this machine, or on the one in `ports`, by the name
    of the model too.
    """

    name: Name
    python: Annotated[Path, NAMEABLE] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    servers: dict[Name, Url] = Field(default_factory=dict)
    ports: dict[Name, _Port] = Field(default_factory=dict)


class Slo(Section):
    """What a request may take to count as good; by default MLPerf's limits for Llama-3.1-8B.

    `ttft_ms` until the first token, `tpot_ms` for each further one.
    """

    ttft_ms: _Amount = 2000.0
    tpot_ms: _Amount = 100.0


class Profile(Section):
    """What is measured: every engine under every load and (input, output) length.

    `batches` are sent at once, `concurrency` requests are kept in flight, `rates` of them arrive a
    second; the last two need a server, and an engine that is none leaves them to one that is. A
    sample of a loop has `requests` (left out: eight times the concurrency, or eight seconds of
    arrivals, at least 32), and never fewer than are in flight. Rounds go on beyond `repeats`, at
    most a hundred, until each workload of a model was measured for `min_seconds` in all. `sessions`
    of all models are open together where memory allows (auto) or always (together), or one at a
    time, opened anew in every round (in_turn), as on a GPU that servers cannot share; only one is
    ever under load. Intervals hold what differs between starts of an engine in the last way alone.
    """

    engines: tuple[Engine, ...]
    batches: tuple[Positive, ...] = (1,)
    concurrency: tuple[Positive, ...] = ()
    rates: tuple[_Amount, ...] = ()
    requests: Positive | None = None
    lengths: tuple[tuple[Positive, Annotated[int, NUMBER, Field(ge=2)]], ...] = ((128, 128),)
    repeats: Positive = 3
    warmup: Count = 1
    min_seconds: Annotated[float, NUMBER, Field(ge=0, le=86400)] = 0.0
    slo: Slo = Slo()
    sessions: Literal["auto", "together", "in_turn"] = "auto"

    @property
    def loads(self) -> dict[str, tuple[float, ...]]:
        """The loads of each mode that has any, ascending, each once."""
        stated = {"offline": self.batches, "closed": self.concurrency, "open": self.rates}
        return {mode: tuple(sorted(set(given))) for mode, given in stated.items() if given}

    def requests_of(self, mode: str, load: float) -> int:
        """How many requests a sample has."""
        if mode == "offline":
            return int(load)
        least = load if mode == "closed" else 1
        return max(self.requests or max(32, round(8 * load)), round(least))

    @model_validator(mode="after")
    def _some_load(self) -> Profile:
        if not (self.batches or self.concurrency or self.rates):
            raise ValueError("state at least one of batches, concurrency and rates")
        return self

    @model_validator(mode="after")
    def _engines_once(self) -> Profile:
        names = [engine.name for engine in self.engines]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"the engine {twice[0]} stands twice: measurements go by its name")
        return self
