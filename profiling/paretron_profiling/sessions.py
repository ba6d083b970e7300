"""Sessions of the models of one engine: opened, tried at their heaviest, together or in turn."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field

from paretron.errors import Code, ParetronError
from paretron.recipe import Profile
from paretron_profiling import gpu, machine
from paretron_profiling.compare import Lane, lane_of
from paretron_profiling.engines.engine import Engine, EngineSettings, Session, settings_for
from paretron_profiling.footprint import HostMark, MemoryPeak
from paretron_profiling.models import ModelUnderTest
from paretron_profiling.schedule import Cell, Unit, heaviest, limits_of
from paretron_profiling.schema import Sample

OnEvent = Callable[[str, Mapping[str, object]], None]
Run = Callable[[Session, Unit], Sample]

# Share of the free memory that open sessions may be planned to take.
MEMORY_SHARE = 0.7
# What an engine says that was given more than it can hold, or that died of it.
_TOO_MUCH = {Code.ENGINE, Code.MEMORY}


@dataclass
class Sessions:
    """An engine's sessions and what is planned on them.

    The first session of a model is tried before anything is timed: every load that was matched to
    the teacher's memory by calculation, and the heaviest of all, run once. What the engine refuses
    goes down by a quarter until it runs, and is left out below the teacher's own load. What that
    took of memory is kept in `peaks`, the loads that went down in `refused`. An engine's very first
    session in this process is thrown away and opened again: its libraries came with it.
    """

    engine: Engine
    settings: EngineSettings
    models: Sequence[ModelUnderTest]
    profile: Profile
    plan: list[Cell]
    run_once: Run
    on_event: OnEvent
    watch: gpu.Watch | None = None
    peaks: dict[str, MemoryPeak] = field(default_factory=dict)
    refused: dict[Lane, int] = field(default_factory=dict)
    _abouts: dict[str, Mapping[str, str]] = field(default_factory=dict)
    _has_libraries: bool = False

    @property
    def about(self) -> dict[str, str]:
        """What the sessions ran with; where that differs between models, each by its name."""
        found = {}
        for key in dict.fromkeys(key for about in self._abouts.values() for key in about):
            said = {name: about[key] for name, about in self._abouts.items() if key in about}
            values = set(said.values())
            same = len(values) == 1 and len(said) == len(self._abouts)
            found[key] = values.pop() if same else ", ".join(f"{n} {v}" for n, v in said.items())
        return found

    @property
    def together(self) -> bool:
        """Whether all models are open at once: as the recipe says, else where memory allows."""
        if self.profile.sessions != "auto":
            return self.profile.sessions == "together"
        return self._needed_bytes() <= MEMORY_SHARE * _free_bytes()

    @contextmanager
    def all_open(self) -> Iterator[dict[str, Session]]:
        """A tried session for every model, by its name."""
        with ExitStack() as stack:
            yield {m.name: stack.enter_context(self.tried(m)) for m in self.models}

    @contextmanager
    def tried(self, model: ModelUnderTest) -> Iterator[Session]:
        """A session of a model that has run the heaviest that is planned of it."""
        while True:
            with ExitStack() as stack:
                session = self._opened_and_tried(model, stack)
                if session is None:
                    continue
                if session.pid == os.getpid() and not self._has_libraries:
                    self._has_libraries = True
                    continue
                try:
                    yield session
                finally:  # what the load client cost is known now
                    self._abouts[model.name] = session.about
                return

    @contextmanager
    def untried(self, model: ModelUnderTest) -> Iterator[Session]:
        """Another session of a model that was tried before."""
        with self._open(model) as session:
            yield session

    def _opened_and_tried(self, model: ModelUnderTest, stack: ExitStack) -> Session | None:
        """None where the engine refused what was matched, which then was lowered."""
        doubtful = [u for cell in self.plan for u in cell.of(model.name) if u.matched]
        mark, device_before = HostMark(), self._device_bytes()
        unit: Unit | None = None
        try:
            session = stack.enter_context(self._open(model))
            for unit in self._to_try(model):
                if self.run_once(session, unit).failures and unit.matched:
                    raise _Refused
        except (ParetronError, _Refused) as error:
            if not doubtful or not (unit is None or unit.matched) or not _is_too_much(error):
                raise
            # What does not even start may do so for the recipe's own loads: tried once more.
            for refused in doubtful if unit is None else [unit]:
                self._lower(refused, at_all=unit is not None)
            return None
        top = heaviest(self._units(model), profile=self.profile)
        grown = None if self.watch is None else self.watch.peak_bytes() - (device_before or 0)
        self.peaks[model.name] = MemoryPeak(
            model.name,
            top.work,
            host_bytes=mark.peak_bytes(session.pid),
            device_bytes=grown,
            own_process=session.pid != os.getpid(),
        )
        self._abouts[model.name] = session.about
        return session

    def _to_try(self, model: ModelUnderTest) -> list[Unit]:
        """What was matched, the most first, and then the heaviest of all."""
        units = self._units(model)
        matched = sorted((u for u in units if u.matched), key=lambda u: -u.work.load)
        top = heaviest(units, profile=self.profile)
        return matched if top in matched else [*matched, top]

    def _units(self, model: ModelUnderTest) -> list[Unit]:
        return [u for cell in self.plan for u in cell.of(model.name)]

    def _lower(self, unit: Unit, *, at_all: bool) -> None:
        """Plan three quarters of a load, or nothing below the loads that are measured anyway."""
        least = max(
            u.work.load for cell in self.plan for u in cell.units
            if not u.matched and lane_of("", u.work) == lane_of("", unit.work)
        )  # fmt: skip
        lower = unit.lower if at_all and unit.lower.work.load > least else None
        self.plan = [cell.changed(unit, lower) for cell in self.plan]
        lane = lane_of(unit.model, unit.work)
        self.refused[lane] = int(least if lower is None else lower.work.load)
        then = "only the recipe's loads are" if lower is None else f"{lower.work.load:g} is"
        self.on_event(
            "note",
            {
                "message": f"{unit.work.engine} refuses {unit.work.load:g} requests of "
                f"{unit.model}, which fit by calculation: {then} measured"
            },
        )

    def _open(self, model: ModelUnderTest) -> AbstractContextManager[Session]:
        self.on_event("profile.open", {"engine": self.engine.name, "model": model.name})
        return self.engine.open(
            model.folders[self.engine.wants],
            settings=settings_for(self.settings, model.name),
            limits=limits_of(model, plan=self.plan, profile=self.profile),
        )

    def _needed_bytes(self) -> int:
        """What all sessions take; weights counted twice (loading)."""
        return sum(
            2 * m.facts.weight_bytes
            + limits_of(m, plan=self.plan, profile=self.profile).kv_bytes
            + self.engine.session_bytes
            for m in self.models
        )

    def _device_bytes(self) -> int | None:
        if self.watch is None:
            return None
        self.watch.begin()
        return self.watch.peak_bytes()


class _Refused(Exception):
    """A server answered, and did not take every request."""


def _is_too_much(error: Exception) -> bool:
    return isinstance(error, _Refused) or (
        isinstance(error, ParetronError) and error.problems[0].code in _TOO_MUCH
    )


def _free_bytes() -> int:
    """Of the machine's memory, or of a GPU's where there is one and it is less."""
    device = gpu.free_bytes()
    host = machine.available_bytes()
    return host if device is None else min(host, device)
