"""Run the models on the engines, interleaved, and condense what was measured."""

from __future__ import annotations

import gc
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import paretron
from paretron.errors import Code, ParetronError, Problem, raise_all
from paretron.plugins import ENGINES, find_plugin
from paretron.recipe import Profile
from paretron.recipe.limits import batch_problems
from paretron_profiling import machine
from paretron_profiling.compare import speedups
from paretron_profiling.engines.engine import Engine, EngineSettings, Session
from paretron_profiling.models import ModelUnderTest
from paretron_profiling.prompts import random_prompts
from paretron_profiling.result import ProfileResult, ProfileStopped
from paretron_profiling.schedule import Cell, Unit, cells, check_lengths, limits_of
from paretron_profiling.schema import Measurement, Sample

OnEvent = Callable[[str, Mapping[str, object]], None]

# Share of the free memory that open sessions may be planned to take.
MEMORY_SHARE = 0.7


def check_engines(profile: Profile) -> list[Problem]:
    """What keeps the recipe's engines from running, all at once; loads none of them."""
    problems: list[Problem] = []
    for settings in profile.engines:
        try:
            engine = find_plugin(ENGINES, settings.name, where="profile.engines")
        except ParetronError as error:
            problems += error.problems
            continue
        problems += engine.check(settings)
        problems += batch_problems(profile, engine=engine.name, largest_batch=engine.largest_batch)
    return problems


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
    they are opened one after the other in every round.

    Errors: OPTIONAL_MISSING, OPTIONAL_OLD, RECIPE_VALUE before anything runs; ProfileStopped
    (ENGINE) with the partial result when an engine fails.
    """
    raise_all([*check_engines(profile), *check_lengths(models, profile=profile)])
    run = _Run(models, profile, seed, on_event)
    hardware = machine.hardware()
    stopped: ParetronError | None = None
    try:
        for settings in profile.engines:
            run.engine(settings)
    except ParetronError as error:
        stopped = error
    measured = run.measurements()
    result = ProfileResult(
        measurements=measured,
        speedups=speedups(measured, models=models, largest_batches=run.largest_batches),
        hardware=hardware,
        engines=run.about,
        method={
            "paretron": paretron.__version__,
            "python": platform.python_version(),
            "seed": seed,
            "repeats": profile.repeats,
            "warmup": profile.warmup,
            "order": "models interleaved in every round, order reversed every other round",
            "prompts": "uniformly random tokens without special ones, new in every round",
            "decoding": "greedy, fixed output length, end of sequence ignored",
        },
        # The whole cause, with an engine's log, goes with the error.
        incomplete=stopped.problems[0].cause.splitlines()[0] if stopped else None,
    )
    if stopped:
        raise ProfileStopped(stopped, result) from stopped
    return result


@dataclass
class _Run:
    """The state of one profiling run: the samples so far, by unit and in order of rounds."""

    models: Sequence[ModelUnderTest]
    profile: Profile
    seed: int
    on_event: OnEvent
    samples: dict[Unit, list[Sample]] = field(default_factory=dict)
    about: dict[str, Mapping[str, str]] = field(default_factory=dict)
    largest_batches: dict[str, int | None] = field(default_factory=dict)

    def engine(self, settings: EngineSettings) -> None:
        """Measure all models on one engine."""
        engine = find_plugin(ENGINES, settings.name, where="profile.engines")
        models = [m for m in self.models if engine.wants in m.folders]
        self.largest_batches[engine.name] = engine.largest_batch
        plan = list(
            cells(
                engine.name,
                models=models,
                profile=self.profile,
                largest_batch=engine.largest_batch,
            )
        )
        if not models:
            raise ParetronError(
                Problem(
                    Code.RECIPE_VALUE,
                    f"{engine.name} runs the export {engine.wants!r}, which no model has",
                    where="profile.engines",
                    fix=f"add {{to: {engine.wants}}} to `export`",
                )
            )
        if self._fit_together(engine, models, plan):
            self._all_open(engine, settings, models, plan)
        else:
            self._one_at_a_time(engine, settings, models, plan)

    def _all_open(
        self,
        engine: Engine,
        settings: EngineSettings,
        models: Sequence[ModelUnderTest],
        plan: Sequence[Cell],
    ) -> None:
        with ExitStack() as stack:
            sessions = {
                m.name: stack.enter_context(self._open(engine, settings, m, plan)) for m in models
            }
            self.about[engine.name] = dict(next(iter(sessions.values())).about)
            for cell in plan:
                for number in range(-self.profile.warmup, self.profile.repeats):
                    for unit in cell.in_round(number):
                        self._sample(sessions[unit.model], unit, number)

    def _one_at_a_time(
        self,
        engine: Engine,
        settings: EngineSettings,
        models: Sequence[ModelUnderTest],
        plan: Sequence[Cell],
    ) -> None:
        for number in range(self.profile.repeats):
            for model in models if number % 2 == 0 else models[::-1]:
                with self._open(engine, settings, model, plan) as session:
                    self.about[engine.name] = dict(session.about)
                    units = [u for cell in plan for u in cell.units if u.model == model.name]
                    for unit in units:
                        for warmup in range(-self.profile.warmup, 0):
                            self._sample(session, unit, warmup)
                        self._sample(session, unit, number)

    def _open(
        self, engine: Engine, settings: EngineSettings, model: ModelUnderTest, plan: Sequence[Cell]
    ) -> AbstractContextManager[Session]:
        self.on_event("profile.open", {"engine": engine.name, "model": model.name})
        folder = model.folders[engine.wants]
        return engine.open(folder, settings=settings, limits=limits_of(model, plan=plan))

    def _sample(self, session: Session, unit: Unit, number: int) -> None:
        """Run one unit once; rounds below 0 are warm-up and are not kept."""
        work = unit.work
        facts = [m.facts for m in self.models]
        prompts = random_prompts(
            batch=work.batch,
            input_len=work.input_len,
            vocab_size=min(f.vocab_size for f in facts),
            avoid=frozenset().union(*(f.special_ids for f in facts)),
            seed=f"{self.seed}/{work.input_len}/{work.batch}/{number}",
        )
        with _no_collection():
            sample = session.generate(prompts, work.output_len)
        _check_whole(sample, unit)
        if number >= 0:
            self.samples.setdefault(unit, []).append(replace(sample, tokens=()))
        self.on_event(
            "profile.sample",
            {
                "engine": work.engine,
                "model": unit.model,
                "batch": work.batch,
                "input_len": work.input_len,
                "output_len": work.output_len,
                "round": number,
                "rounds": self.profile.repeats,
                "warmup": number < 0,
                "output_tok_s": sample.output_tok_s(work),
            },
        )

    def _fit_together(
        self, engine: Engine, models: Sequence[ModelUnderTest], plan: Sequence[Cell]
    ) -> bool:
        """Whether sessions of all models fit in memory at once; weights counted twice (loading)."""
        needed = sum(
            2 * m.facts.weight_bytes + limits_of(m, plan=plan).kv_bytes + engine.session_bytes
            for m in models
        )
        return needed <= MEMORY_SHARE * machine.available_bytes()

    def measurements(self) -> dict[str, tuple[Measurement, ...]]:
        """What was measured so far, by model in their order."""
        return {
            m.name: tuple(
                Measurement.of(unit.work, samples=samples, warmup=self.profile.warmup)
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


def _check_whole(sample: Sample, unit: Unit) -> None:
    """An engine that stopped early would look fast."""
    lengths = {len(t) for t in sample.tokens}
    if len(sample.tokens) != unit.work.batch or lengths != {unit.work.output_len}:
        raise ParetronError(
            Problem(
                Code.ENGINE,
                f"{unit.work.engine} gave {len(sample.tokens)} answers of {sorted(lengths)} tokens "
                f"for {unit.work.batch} requests of {unit.work.output_len}",
                where=unit.model,
                fix="without full answers there is no speed to state",
            )
        )
