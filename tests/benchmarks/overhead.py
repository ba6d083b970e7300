"""What profiling costs: an engine's calls with the profiler around them and without: JSON lines.

PYTHONPATH=tests python -m benchmarks.overhead NAME=DIR[,DIR] [--pairs 60] [--batch 4]

Each pair makes the same call twice, in an order that alternates: once bare, as a script would, and
once through the profiler's own step, which makes prompts, checks the answer, keeps the sample and
says so. `engine` is the time inside of the engine's call, profiled over bare: the median of the
pairs with its interval; `engine_cpu` is the processor time that all threads spent there, which
others on the machine disturb less. `around` is what the profiler's step takes besides the call, as
a share of it; no figure holds any of it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

from paretron.cli.progress import Progress
from paretron.plugins import ENGINES, find_plugin
from paretron.recipe import Engine, Profile
from paretron.run.measure import models_by_name
from paretron_profiling.machine import hardware
from paretron_profiling.measure import _Run
from paretron_profiling.models import ModelUnderTest
from paretron_profiling.schedule import cells, limits_of
from paretron_profiling.schema import Sample
from paretron_profiling.stats import median_interval, paired_ratios

WARMUP = 3


class Timed:
    """A session that notes how long its last call took, seen from outside."""

    def __init__(self, session: Any) -> None:
        self._session, self.took_s, self.cpu_s = session, 0.0, 0.0

    @property
    def about(self) -> Mapping[str, str]:
        return dict(self._session.about)

    @property
    def pid(self) -> int | None:
        return int(self._session.pid)

    def generate(self, prompts: Sequence[Sequence[int]], output_len: int) -> Sample:
        began, cpu = perf_counter(), process_time()
        sample: Sample = self._session.generate(prompts, output_len)
        self.took_s, self.cpu_s = perf_counter() - began, process_time() - cpu
        return sample


def main() -> None:
    """Measure both engines that run in this process on one model."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", metavar="NAME=DIR[,DIR]", help="a checkpoint, an ONNX export")
    parser.add_argument("--engines", nargs="*", default=["transformers", "ortgenai"])
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lengths", type=int, nargs=2, default=[128, 32])
    asked = parser.parse_args()
    engines = [Engine(name=name) for name in asked.engines]
    (model,) = models_by_name([asked.model], engines=engines)
    for settings in engines:
        profile = Profile(
            engines=(settings,), batches=(asked.batch,), lengths=(tuple(asked.lengths),)
        )
        print(json.dumps(compared(model, settings, profile, pairs=asked.pairs)), flush=True)


def compared(
    model: ModelUnderTest, settings: Engine, profile: Profile, *, pairs: int
) -> dict[str, Any]:
    """One engine's times with and without the profiler."""
    engine = find_plugin(ENGINES, settings.name, where="--engines")
    plan = list(cells(engine.name, models=[model], profile=profile))
    (unit,) = plan[0].units
    limits = limits_of(model, plan=plan, profile=profile)
    wall: dict[str, list[float]] = {"bare": [], "profiled": []}
    cpu: dict[str, list[float]] = {"bare": [], "profiled": []}
    around: list[float] = []
    folder: Path = model.folders[engine.wants]
    with (
        Progress(None) as progress,
        engine.open(folder, settings=settings, limits=limits) as session,
    ):
        run = _Run([model], profile, 0, progress.of("profile"))
        timed = Timed(session)
        for number in range(-WARMUP, pairs):
            for name in ("bare", "profiled") if number % 2 else ("profiled", "bare"):
                began = perf_counter()
                if name == "bare":
                    prompts = run._prompts(unit, int(unit.work.load), str(number))
                    timed.generate(prompts, unit.work.output_len)
                else:
                    run._sample(timed, unit, number)
                if number >= 0:
                    wall[name].append(timed.took_s)
                    cpu[name].append(timed.cpu_s)
                    if name == "profiled":
                        around.append((perf_counter() - began) / timed.took_s - 1)
    return {
        "engine_name": engine.name,
        "model": model.name,
        "batch": int(unit.work.load),
        "lengths": [unit.work.input_len, unit.work.output_len],
        "pairs": pairs,
        "bare_s": median(wall["bare"]),
        "profiled_s": median(wall["profiled"]),
        "engine": ratio(wall),
        "engine_cpu": ratio(cpu),
        "around": {"median": median(around), "largest": max(around)},
        "hardware": hardware(),
    }


def ratio(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The profiled calls over the bare ones of the same pairs, and the pairs' own spread."""
    found = paired_ratios(times["profiled"], times["bare"])
    interval = median_interval(found)
    return {
        "ratio": interval.median,
        "low": interval.low,
        "high": interval.high,
        "coverage": interval.coverage,
        "smallest": min(found),
        "largest": max(found),
    }


if __name__ == "__main__":
    main()
