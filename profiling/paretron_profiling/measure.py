"""Run the models on the engines, interleaved, and condense what was measured."""

from __future__ import annotations

import gc
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import cast

import paretron
from paretron.errors import Code, ParetronError, Problem, raise_all
from paretron.plugins import ENGINES, find_plugin
from paretron.recipe import Profile
from paretron.recipe.limits import address_problems, batch_problems, mode_problems
from paretron_profiling import gpu, machine
from paretron_profiling.compare import Lane, speedups
from paretron_profiling.engines.engine import Engine, EngineSettings, Pace, Server, Session
from paretron_profiling.footprint import MemoryPeak
from paretron_profiling.models import ModelUnderTest
from paretron_profiling.prompts import random_prompts
from paretron_profiling.result import ProfileResult, ProfileStopped
from paretron_profiling.roofline.probe import probe_device
from paretron_profiling.roofline.rows import roofline_json
from paretron_profiling.schedule import MOST_ROUNDS, Cell, Unit, cells, check_lengths, in_flight
from paretron_profiling.schema import BUSY, OFFLINE, Measurement, Sample
from paretron_profiling.sessions import OnEvent, Sessions


def check_engines(profile: Profile) -> list[Problem]:
    """What keeps the recipe's engines from running, all at once; loads none of them."""
    problems: list[Problem] = []
    modes: dict[str, frozenset[str]] = {}
    for settings in profile.engines:
        try:
            engine = find_plugin(ENGINES, settings.name, where="profile.engines")
        except ParetronError as error:
            problems += error.problems
            continue
        modes[engine.name] = engine.modes
        problems += engine.check(settings)
        problems += batch_problems(profile, engine=engine.name, largest_batch=engine.largest_batch)
    return problems + mode_problems(profile, modes=modes)


def profile_models(
    models: Sequence[ModelUnderTest],
    *,
    profile: Profile,
    seed: int = 0,
    on_event: OnEvent = lambda kind, fields: None,
) -> ProfileResult:
    """Measure every model on every engine of the profile, and take the speedups.

    In each round every model runs every workload once, so that a speedup compares runs that are
    neighbours in time; warm-up rounds are discarded. Prompts differ between rounds and are the
    same for all models. Sessions of all models stay open together where memory allows, otherwise
    they are opened one after the other in every round; one at a time is under load.

    Errors: OPTIONAL_MISSING, OPTIONAL_OLD, RECIPE_VALUE before anything runs; ProfileStopped
    (ENGINE, INTERRUPTED) with the partial result when an engine fails or somebody stops it.
    """
    names = [m.name for m in models]
    addresses = [p for e in profile.engines for p in address_problems(e, models=names)]
    raise_all([*check_engines(profile), *addresses, *check_lengths(models, profile=profile)])
    hardware = machine.hardware()
    watch = gpu.find_watch()
    run = _Run(models, profile, seed, on_event, watch)
    stopped: ParetronError | None = None
    with watch.running() if watch else nullcontext():
        try:
            for settings in profile.engines:
                run.engine(settings)
        except ParetronError as error:
            stopped = error
        except KeyboardInterrupt:
            stopped = ParetronError(
                Problem(Code.INTERRUPTED, "stopped on request", fix="the same command again")
            )
    measured = run.measurements(doubts=(BUSY,) if machine.busy(hardware) else ())
    result = ProfileResult(
        measurements=measured,
        speedups=speedups(
            measured,
            models=models,
            largest_batches=run.largest_batches,
            slo=profile.slo,
            refused=run.refused,
        ),
        hardware=hardware,
        engines=run.about,
        method=_method(profile, seed),
        # The whole cause, with an engine's log, goes with the error.
        incomplete=stopped.problems[0].cause.splitlines()[0] if stopped else None,
        memory=tuple(run.peaks),
    )
    if stopped:
        raise ProfileStopped(stopped, result) from stopped
    return result


def with_bounds(
    result: ProfileResult, models: Sequence[ModelUnderTest], *, on_event: OnEvent
) -> ProfileResult:
    """The result with what a probe finds of the device, and the roofline that follows from it.

    Without a probe that runs there is neither, and a note says why.
    """
    try:
        device = probe_device()
    except ParetronError as error:
        on_event("note", {"message": f"no roofline: {error.problems[0].cause}"})
        return result
    roofline = roofline_json(
        models,
        result.measurements,
        speedups=result.speedups,
        device=device,
        about=result.engines,
    )
    return replace(result, device=device.as_json(), roofline=roofline)


def _method(profile: Profile, seed: int) -> dict[str, object]:
    """How it was measured, for a report's caption."""
    return {
        "paretron": paretron.__version__,
        "python": platform.python_version(),
        "seed": seed,
        "repeats": profile.repeats,
        "warmup": profile.warmup,
        "min_seconds": profile.min_seconds,
        "most_rounds": max(profile.repeats, MOST_ROUNDS),
        "slo_ttft_ms": profile.slo.ttft_ms,
        "slo_tpot_ms": profile.slo.tpot_ms,
        "order": "models interleaved in every round, order reversed every other round",
        "prompts": "uniformly random tokens without special ones, new in every round",
        "decoding": "greedy, fixed output length, end of sequence ignored",
        "arrivals": "of an open loop: one Poisson process, the same in every round",
    }


@dataclass
class _Run:
    """The state of one profiling run: the samples so far, by unit and in order of rounds."""

    models: Sequence[ModelUnderTest]
    profile: Profile
    seed: int
    on_event: OnEvent
    watch: gpu.Watch | None = None
    samples: dict[Unit, list[Sample]] = field(default_factory=dict)
    about: dict[str, Mapping[str, str]] = field(default_factory=dict)
    largest_batches: dict[str, int | None] = field(default_factory=dict)
    refused: dict[Lane, int] = field(default_factory=dict)
    peaks: list[MemoryPeak] = field(default_factory=list)

    def engine(self, settings: EngineSettings) -> None:
        """Measure all models on one engine."""
        engine = find_plugin(ENGINES, settings.name, where="profile.engines")
        models = [m for m in self.models if engine.wants in m.folders]
        if not models:
            raise _no_such_export(engine)
        self.largest_batches[engine.name] = engine.largest_batch
        plan = cells(
            engine.name,
            models=models,
            profile=self.profile,
            modes=engine.modes,
            largest_batch=engine.largest_batch,
        )
        sessions = Sessions(
            engine, settings, models, self.profile, list(plan), self._trial, self.on_event,
            self.watch, refused=self.refused,
        )  # fmt: skip
        try:
            if sessions.together:
                self._all_open(sessions)
            else:
                self._one_at_a_time(sessions)
        finally:
            self.peaks += sessions.peaks.values()
            if sessions.about:
                self.about[engine.name] = sessions.about

    def _all_open(self, sessions: Sessions) -> None:
        with sessions.all_open() as opened:
            for cell in sessions.plan:
                for number in self._rounds(cell):
                    for unit in cell.in_round(number):
                        self._sample(opened[unit.model], unit, number)

    def _one_at_a_time(self, sessions: Sessions) -> None:
        for number in self._rounds_of(sessions):
            models = sessions.models if number % 2 == 0 else sessions.models[::-1]
            for model in models:
                tried = model.name in sessions.peaks
                opened = sessions.untried(model) if tried else sessions.tried(model)
                with opened as session:
                    for unit in (u for cell in sessions.plan for u in cell.of(model.name)):
                        for warmup in range(-self.profile.warmup, 0):
                            self._sample(session, unit, warmup)
                        self._sample(session, unit, number)

    def _rounds(self, cell: Cell) -> Iterator[int]:
        """The numbers of a cell's rounds, warm-up below 0, until it was measured long enough."""
        yield from range(-self.profile.warmup, self.profile.repeats)
        for number in range(self.profile.repeats, MOST_ROUNDS):
            if self._long_enough(cell.units):
                return
            yield number

    def _rounds_of(self, sessions: Sessions) -> Iterator[int]:
        """Likewise of all cells, without the warm-up, which follows every start."""
        yield from range(self.profile.repeats)
        for number in range(self.profile.repeats, MOST_ROUNDS):
            if self._long_enough([u for cell in sessions.plan for u in cell.units]):
                return
            yield number

    def _long_enough(self, units: Sequence[Unit]) -> bool:
        seconds = (sum(s.total_s for s in self.samples[u] if s.completed) for u in units)
        return min(seconds, default=0.0) >= self.profile.min_seconds

    def _trial(self, session: Session, unit: Unit) -> Sample:
        """Run a unit once, all that it may have under way at once, before anything is timed."""
        requests = in_flight(unit.work, profile=self.profile)
        sample = session.generate(self._prompts(unit, requests, "trial"), unit.work.output_len)
        _check_whole(sample, unit, requests)
        return sample

    def _sample(self, session: Session, unit: Unit, number: int) -> None:
        """Run one unit once; rounds below 0 are warm-up and are not kept."""
        work = unit.work
        requests = self.profile.requests_of(work.mode, work.load)
        prompts = self._prompts(unit, requests, str(number))
        with _no_collection():
            began_s = self.watch.begin() if self.watch else 0.0
            if work.mode == OFFLINE:
                sample = session.generate(prompts, work.output_len)
            else:
                pace = Pace(work.mode, work.load, self.seed)
                sample = cast(Server, session).serve(prompts, work.output_len, pace=pace)
            if self.watch:
                reading, doubts = self.watch.end(began_s)
                sample = replace(sample, gpu=reading, doubts=(*sample.doubts, *doubts))
        _check_whole(sample, unit, requests)
        if number >= 0:
            self.samples.setdefault(unit, []).append(replace(sample, tokens=()))
        self.on_event(
            "profile.sample",
            {
                "engine": work.engine,
                "model": unit.model,
                "mode": work.mode,
                "load": work.load,
                "input_len": work.input_len,
                "output_len": work.output_len,
                "round": number,
                "rounds": self.profile.repeats,
                "warmup": number < 0,
                "output_tok_s": sample.output_tok_s(work),
            },
        )

    def _prompts(self, unit: Unit, count: int, round_name: str) -> list[list[int]]:
        """The same for all models."""
        work, facts = unit.work, [m.facts for m in self.models]
        return random_prompts(
            batch=count,
            input_len=work.input_len,
            vocab_size=min(f.vocab_size for f in facts),
            avoid=frozenset().union(*(f.special_ids for f in facts)),
            seed=f"{self.seed}/{work.input_len}/{work.load}/{round_name}",
        )

    def measurements(self, *, doubts: Sequence[str]) -> dict[str, tuple[Measurement, ...]]:
        """What was measured so far, by model in their order; `doubts` are of the whole run."""
        return {
            m.name: tuple(
                Measurement.of(
                    unit.work,
                    samples=samples,
                    warmup=self.profile.warmup,
                    slo=self.profile.slo,
                    min_seconds=self.profile.min_seconds,
                    doubts=doubts,
                )
                for unit, samples in self.samples.items()
                if unit.model == m.name
            )
            for m in self.models
        }


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep our own garbage from being collected inside an engine's time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _check_whole(sample: Sample, unit: Unit, requests: int) -> None:
    """An engine that stopped early would look fast; a request that failed says why it did."""
    lengths = {len(t) for t in sample.tokens}
    whole = not lengths or lengths == {unit.work.output_len}
    if sample.completed + len(sample.failures) != requests or not whole:
        raise ParetronError(
            Problem(
                Code.ENGINE,
                f"{unit.work.engine} gave {sample.completed} answers"
                + (f" of {sorted(lengths)} tokens" if lengths else "")
                + f" for {requests} requests of {unit.work.output_len}",
                where=unit.model,
                fix="without full answers there is no speed to state",
            )
        )


def _no_such_export(engine: Engine) -> ParetronError:
    return ParetronError(
        Problem(
            Code.RECIPE_VALUE,
            f"{engine.name} runs the export {engine.wants!r}, which no model has",
            where="profile.engines",
            fix=f"add {{to: {engine.wants}}} to `export`",
        )
    )
