"""An operator table for a search's budget, measured on the engine that the budget names."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paretron.artifacts.config import DTYPE_NAMES
from paretron.artifacts.journal import Journal
from paretron.artifacts.manifest import Provenance
from paretron.errors import Code, ParetronError, Problem, raise_all
from paretron.families import Family, Sizes, family_of, sizes
from paretron.families.table import with_sizes
from paretron.plan.plan import student_dtype
from paretron.plan.sources import FoundTeacher, find_teacher
from paretron.plugins import ENGINES, EXPORTERS, find_plugin
from paretron.recipe import Engine, Export, Recipe, Search, Speed
from paretron.run.events import OnEvent
from paretron.run.pretrain import write_random_model
from paretron.search.candidates import all_hold, refuse_none
from paretron.search.costs import measures
from paretron.search.space import distinct, shapes_of
from paretron.search.table import OperatorTable
from paretron.search.timing import grid_points
from paretron_profiling.models import ModelUnderTest
from paretron_profiling.roofline.operators import EngineTimer, Timed, device_name, rows_of

CHECKPOINT = "hf"

# What may go wrong with one shape and not with the next.
_OF_A_SHAPE = (Code.ENGINE, Code.GATE_PARITY, Code.GATE_RELOAD, Code.MEMORY, Code.UNSUPPORTED)


@dataclass(frozen=True)
class Tabling:
    """What to measure: shapes of a student's search, on the engine and under the load it states."""

    student: str
    recipe: Recipe
    found: FoundTeacher
    search: Search
    speed: Speed
    settings: Engine

    @classmethod
    def of(
        cls, recipe: Recipe, *, student: str | None, python: Path | None, offline: bool
    ) -> Tabling:
        """Of a recipe: the student that searches by speed, or the one named.

        Errors: USAGE where there is none or more than one, UNSUPPORTED for a teacher that is not
        there yet, those of the engine's check.
        """
        name, search, speed = _searching(recipe, student)
        if recipe.teacher.pretrain is not None:
            raise ParetronError(
                Problem(
                    Code.UNSUPPORTED,
                    "the recipe makes its teacher, so that there is no tokenizer yet",
                    where="teacher.pretrain",
                    fix="`paretron run` once, then teacher: {model: RUN/stages/teacher}",
                )
            )
        known = recipe.profile.engines if recipe.profile is not None else ()
        settings = next((e for e in known if e.name == speed.engine), Engine(name=speed.engine))
        if python is not None:
            settings = settings.model_copy(update={"python": python.absolute()})
        problems = []
        if settings.servers:
            cause = "a server that runs already has one model, not the shapes of a table"
            problems.append(Problem(Code.UNSUPPORTED, cause, where=f"profile: {settings.name}"))
        problems += find_plugin(ENGINES, settings.name, where="budget.speed").check(settings)
        raise_all(problems)
        return cls(name, recipe, find_teacher(recipe, offline=offline), search, speed, settings)

    @property
    def family(self) -> Family:
        """The teacher's."""
        return family_of(self.found.config)

    @property
    def dtype(self) -> str:
        """The students' torch dtype."""
        return DTYPE_NAMES[student_dtype(self.recipe, self.found)]

    @property
    def export(self) -> Export | None:
        """The export that the engine runs, as the recipe states it; None for the checkpoint."""
        wants = find_plugin(ENGINES, self.settings.name, where="budget.speed").wants
        if wants == CHECKPOINT:
            return None
        return next((e for e in self.recipe.export if e.to == wants), Export(to=wants))

    def points(self) -> list[dict[str, int]]:
        """The layer shapes to time, smallest first; RECIPE_TARGET where the space holds none."""
        family, config = self.family, self.found.config
        shapes = shapes_of(self.search.space, sizes(family, config))
        counted = measures(
            self.search.budget, shapes, family=family, config=config,
            dtype=student_dtype(self.recipe, self.found),
        )  # fmt: skip
        refuse_none(f"students.{self.student}.search", shapes, counted)
        grid = grid_points(shapes.of(all_hold(shapes, counted)))
        return distinct(grid, [axis for axis in grid.sizes if axis != "layers"])

    @contextmanager
    def made(self, size: Sizes, layers: int) -> Iterator[ModelUnderTest]:
        """A model of random weights, exported where the engine wants it, in a temporary folder."""
        from paretron.artifacts.reader import Checkpoint  # opens what was just written
        from paretron_profiling.models import ModelFacts

        if self.found.folder is None:
            raise ValueError("a teacher without a folder")
        config = with_sizes(
            self.family, self.found.config, {**size, "layers": layers}, kept_layers=(0,) * layers
        )
        with tempfile.TemporaryDirectory(prefix="paretron-table-") as place:
            folder = Path(place) / CHECKPOINT
            write_random_model(
                config, folder, companions=self.found.folder,
                dtype=student_dtype(self.recipe, self.found), seed=self.recipe.seed,
            )  # fmt: skip
            folders = {CHECKPOINT: folder}
            if self.export is not None:
                folders[self.export.to] = Path(place) / "export"
                exporter = find_plugin(EXPORTERS, self.export.to, where="export")
                raise_all(exporter.problems(Checkpoint.open(folder).config, export=self.export))
                exporter.export(
                    folder, export=self.export, texts=None, out=folders[self.export.to],
                    provenance=Provenance(kind="export"), on_event=lambda kind, fields: None,
                )  # fmt: skip
            yield ModelUnderTest("random", "random", folders, ModelFacts.of(folder))


def measure_table(tabling: Tabling, *, journal: Path, on_event: OnEvent) -> OperatorTable:
    """Measure every point; what the journal holds of the same settings is not measured again.

    A shape that the engine refuses has rows without seconds. Errors: ENGINE and those of an export
    where no shape could be measured.
    """
    engine = find_plugin(ENGINES, tabling.settings.name, where="budget.speed")
    timer = EngineTimer(engine, tabling.settings, tabling.speed, tabling.made, tabling.recipe.seed)
    kept = Journal(journal, of=_identity(tabling), start_over=True)
    points = tabling.points()
    timed: list[Timed] = []
    refused: ParetronError | None = None
    for done, size in enumerate(points, start=1):
        key = tuple(f"{axis}={n}" for axis, n in size.items())
        try:
            figures = kept.known.get(key) or kept.add(key, timer.timed(size).to_json())
            timed.append(Timed.from_json(figures))
        except ParetronError as error:
            if error.problems[0].code not in _OF_A_SHAPE:
                raise
            refused = error
            timed.append(Timed.failed(size))
            message = f"not measured: {', '.join(key)}: {error.problems[0].cause.splitlines()[0]}"
            on_event("note", {"message": message})
        on_event("progress", {"done": done, "total": len(points), "unit": "shapes"})
    about = next((one.about for one in timed if one.about), None)
    if about is None and refused is not None:
        raise refused
    export = tabling.export
    stated = {} if export is None else {"export": export.model_dump_json(exclude_defaults=True)}
    return OperatorTable(
        engine=engine.name,
        device=device_name(about or {}),
        dtype=tabling.dtype,
        model_type=tabling.family.model_type,
        versions={**(about or {}), **stated},
        rows=rows_of(timed, tabling.speed),
    )


def _searching(recipe: Recipe, student: str | None) -> tuple[str, Search, Speed]:
    """The one student whose budget states a speed, or the one named; USAGE otherwise."""
    found = {
        name: (search, search.budget.speed)
        for name, one in recipe.students.items()
        if (search := one.search) is not None and search.budget.speed is not None
    }
    if student is None and len(found) == 1:
        student = next(iter(found))
    if student in found:
        search, speed = found[student]
        return student, search, speed
    cause = f"{student!r} does not search by speed" if student else "name the student that is meant"
    raise ParetronError(
        Problem(
            Code.USAGE,
            cause if found else "no student of this recipe searches by speed",
            where="--student" if found else "students",
            fix=f"--student {' or '.join(found)}"
            if found
            else "search: {budget: {speed: {engine: vllm, ms: 100, table: vllm.json}}}",
        )
    )


def _identity(tabling: Tabling) -> Mapping[str, Any]:
    """What a figure depends on besides its shape."""
    export = tabling.export
    return {
        "engine": tabling.settings.model_dump(mode="json"),
        "batch": tabling.speed.batch,
        "lengths": list(tabling.speed.lengths),
        "repeats": tabling.speed.repeats,
        "dtype": tabling.dtype,
        "export": None if export is None else export.model_dump(mode="json"),
        "config": {k: v for k, v in tabling.found.config.items() if k != "transformers_version"},
    }
