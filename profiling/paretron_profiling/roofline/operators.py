"""Rows of an operator table from any engine, by the difference of a shallow and a deep model.

An engine does not hand over its layers. But two models that differ only in how many equal layers
they have differ in time by those layers, so that

    layer = (deep - shallow) / (layers of deep - layers of shallow),
    ends = shallow - layer * layers of shallow.

Prefill is the time until a batch has its first tokens, decode the mean of the steps after it. Both
models are open together and measured in turns, and the differences are taken pair by pair.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from paretron.errors import Code, ParetronError, Problem
from paretron.families import Sizes
from paretron.recipe import Speed
from paretron.search.table import ENDS, NO_LAYER, Part, Phase, Row, decode_context
from paretron_profiling import machine
from paretron_profiling.engines.engine import Engine, EngineSettings, Limits, Session
from paretron_profiling.models import ModelUnderTest
from paretron_profiling.prompts import random_prompts

SHALLOW, DEEP = 1, 5  # layers

# A model of a shape with so many layers, in the form that the engine runs, while it is needed.
Made = Callable[[Sizes, int], AbstractContextManager[ModelUnderTest]]


@dataclass(frozen=True)
class Timed:
    """Both phases of one shape: seconds of a layer and of the ends, one a repeat.

    Without any where the engine does not run the shape.
    """

    sizes: Mapping[str, int]
    layer_s: Mapping[Phase, tuple[float, ...]]
    ends_s: Mapping[Phase, tuple[float, ...]]
    about: Mapping[str, str]

    @classmethod
    def failed(cls, size: Sizes) -> Timed:
        """A shape that the engine did not run."""
        return cls(dict(size), {}, {}, {})

    def to_json(self) -> dict[str, Any]:
        """The form that a journal keeps."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Timed:
        """The inverse of to_json."""
        layer_s, ends_s = (
            {phase: tuple(seconds) for phase, seconds in data[key].items()}
            for key in ("layer_s", "ends_s")
        )
        return cls(data["sizes"], layer_s, ends_s, data["about"])


@dataclass(frozen=True)
class EngineTimer:
    """Times shapes through one engine under the load that a search's budget states."""

    engine: Engine
    settings: EngineSettings
    speed: Speed
    made: Made
    seed: int = 0

    def timed(self, size: Sizes) -> Timed:
        """Measure one shape: two models, `repeats` pairs after one that warms up.

        Errors: ENGINE, and those of making a model.
        """
        with ExitStack() as stack:
            depths = (SHALLOW, DEEP)
            models = [stack.enter_context(self.made(size, depth)) for depth in depths]
            sessions = [stack.enter_context(self._open(model)) for model in models]
            facts = models[0].facts
            pairs = []
            for number in range(-1, self.speed.repeats):
                prompts = random_prompts(
                    batch=self.speed.batch,
                    input_len=self.speed.lengths[0],
                    vocab_size=facts.vocab_size,
                    avoid=facts.special_ids,
                    seed=f"{self.seed}/{number}",
                )
                turn = sessions if number % 2 else sessions[::-1]
                found = {id(s): self._seconds(s, prompts) for s in turn}
                if number >= 0:
                    pairs.append((found[id(sessions[0])], found[id(sessions[1])]))
            about = dict(sessions[0].about)
        layer: dict[Phase, tuple[float, ...]] = {}
        ends: dict[Phase, tuple[float, ...]] = {}
        for phase in pairs[0][0]:
            layer[phase] = tuple((d[phase] - s[phase]) / (DEEP - SHALLOW) for s, d in pairs)
            typical = median(layer[phase])
            ends[phase] = tuple(s[phase] - SHALLOW * typical for s, _ in pairs)
        return Timed(dict(size), layer, ends, about)

    def _open(self, model: ModelUnderTest) -> AbstractContextManager[Session]:
        tokens = sum(self.speed.lengths)
        limits = Limits(
            batch=self.speed.batch,
            context_len=tokens,
            kv_bytes=self.speed.batch * tokens * model.facts.kv_bytes_per_token,
        )
        return self.engine.open(
            model.folders[self.engine.wants], settings=self.settings, limits=limits
        )

    def _seconds(self, session: Session, prompts: Sequence[Sequence[int]]) -> dict[Phase, float]:
        steps = self.speed.lengths[1] - 1
        sample = session.generate(prompts, self.speed.lengths[1])
        if sample.completed != len(prompts):
            cause = f"{self.engine.name} answered {sample.completed} of {len(prompts)} requests"
            raise ParetronError(Problem(Code.ENGINE, cause, fix="look at its own log"))
        return {
            "prefill": sample.prefill_s,
            "decode": (sample.total_s - sample.prefill_s) / steps,
        }


def rows_of(timed: Sequence[Timed], speed: Speed) -> tuple[Row, ...]:
    """The table's rows: a layer of every shape, and the ends of every hidden size and vocabulary.

    Ends were seen once with every layer shape of their sizes; the median counts. A figure that
    noise made zero or less is a row without seconds, which the reader takes for unknown.
    """
    contexts: dict[Phase, int] = {"prefill": speed.lengths[0], "decode": decode_context(speed)}
    rows = []
    for phase, context in contexts.items():
        layers: dict[tuple[tuple[str, int], ...], list[float]] = {}
        ends: dict[tuple[tuple[str, int], ...], list[float]] = {}
        for one in timed:
            of_layer = tuple((a, n) for a, n in one.sizes.items() if a not in NO_LAYER)
            layers.setdefault(of_layer, []).extend(one.layer_s.get(phase, ()))
            of_ends = tuple((a, one.sizes[a]) for a in ENDS)
            ends.setdefault(of_ends, []).extend(one.ends_s.get(phase, ()))
        both: tuple[tuple[Part, Any], ...] = (("layer", layers), ("ends", ends))
        for part, found in both:
            for size, seconds in found.items():
                middle = median(seconds) if seconds else 0.0
                rows.append(
                    Row(
                        part=part, phase=phase, sizes=dict(size), batch=speed.batch,
                        context=context, repeats=len(seconds),
                        seconds=middle if middle > 0 else None,
                        spread=max(seconds) - min(seconds) if seconds else None,
                    )
                )  # fmt: skip
    return tuple(rows)


def device_name(about: Mapping[str, str]) -> str:
    """Where an engine ran, for the table's `device`."""
    place = about.get("device", "unknown device")
    if place != "cpu":
        gpu = machine.hardware().get("gpu")
        return f"{gpu}, {place}" if gpu else place
    threads = about.get("threads") or os.environ.get("OMP_NUM_THREADS", "all")
    return f"{machine.hardware()['cpu']}, {threads} threads"
