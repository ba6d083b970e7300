"""The plan of a recipe: what it will make, what that costs, and every problem at once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretron.artifacts.config import DTYPE_NAMES, relabel
from paretron.compensate.decide import decide
from paretron.errors import Code, ParetronError, Problem
from paretron.families import family_of, sizes
from paretron.families.kinds import merging_problem
from paretron.families.table import with_sizes
from paretron.plan.advice import VLLM_HEAD_DIM, Advice, advise
from paretron.plan.compensation import Compensation, compensation_cost
from paretron.plan.correction import correction_problems, trained_weights
from paretron.plan.cost import ModelFacts, model_facts
from paretron.plan.estimate import Estimate, estimate_stages
from paretron.plan.exporting import export_estimates
from paretron.plan.hardware import Hardware, detect, free_disk_bytes, written_bytes
from paretron.plan.parallel import parallel_problems
from paretron.plan.shapes import student_sizes, target_problems
from paretron.plan.sources import FoundTeacher, data_problems, find_teacher, pinned
from paretron.plan.stages import TEACHER, Stage, stages_of
from paretron.plan.tasks import task_outlook
from paretron.plugins import ENGINES, EXPORTERS, find_plugin
from paretron.recipe import Export, Recipe, Score, Search, Student
from paretron.recipe.limits import (
    address_problems,
    batch_problems,
    loss_problems,
    mode_problems,
)

if TYPE_CHECKING:
    from paretron.plan.searching import SearchOutlook


@dataclass(frozen=True)
class Plan:
    """What `run` executes, and what `plan` prints."""

    recipe: Recipe
    teacher_folder: Path | None  # None: pretrained by the run
    teacher_commit: str | None
    teacher: ModelFacts
    students: Mapping[str, ModelFacts]
    stages: tuple[Stage, ...]
    estimates: Mapping[str, Estimate]
    hardware: Hardware
    disk_bytes: int
    disk_free_bytes: int
    problems: tuple[Problem, ...] = field(default=())
    searches: Mapping[str, SearchOutlook] = field(default_factory=dict)
    advice: tuple[Advice, ...] = field(default=())
    notices: tuple[str, ...] = field(default=())

    @property
    def recipe_sha256(self) -> str:
        """The sha256 of the recipe with every default filled in: equal for equal jobs."""
        resolved = self.recipe.model_dump(mode="json", by_alias=True)
        return hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest()

    def as_json(self) -> dict[str, Any]:
        """The stable form of `plan --json`."""
        return {
            "recipe_sha256": self.recipe_sha256,
            "teacher": self.teacher.as_json() | {"commit": self.teacher_commit},
            "students": {
                name: facts.as_json()
                | {
                    "params_share": facts.params / self.teacher.params,
                    "kv_share": facts.kv_bytes_per_token / self.teacher.kv_bytes_per_token,
                }
                for name, facts in self.students.items()
            },
            "stages": [
                {"name": s.name, "inputs": dict(s.inputs)} | self.estimates[s.name].as_json()
                for s in self.stages
            ],
            "hardware": {
                "name": self.hardware.name,
                "flop_s": self.hardware.flop_s,
                "memory_bytes": self.hardware.memory_bytes,
                "basis": self.hardware.basis,
            },
            "disk_bytes": self.disk_bytes,
            "disk_free_bytes": self.disk_free_bytes,
            "searches": {name: found.as_json() for name, found in self.searches.items()},
            "problems": [p.as_json() for p in self.problems],
            "advice": [a.as_json() for a in self.advice],
            "notices": list(self.notices),
        }


def make_plan(recipe: Recipe, *, out: Path, offline: bool) -> Plan:
    """Plan a recipe without reading a weight or tokenising a text.

    The plan's recipe names every hub dataset by its commit. Problems are collected; only a teacher
    whose config cannot be read ends the planning.
    """
    found = find_teacher(recipe, offline=offline)
    recipe, unfound = pinned(recipe, offline=offline)
    problems = [*found.problems, *unfound, *data_problems(recipe, found.config)]
    problems += correction_problems(recipe)
    family = family_of(found.config)
    teacher_sizes = sizes(family, found.config)
    teacher = model_facts(found.config, dtype=found.dtype)
    exporters, unknown = find_exporters(recipe)
    problems += unknown
    students: dict[str, ModelFacts] = {}
    searches: dict[str, SearchOutlook] = {}
    notices: list[str] = list(found.notices)
    for name, target in recipe.students.items():
        if target.search is not None:
            outlook, unreachable = _outlook(name, target.search, recipe, found)
            problems += unreachable
            if outlook is not None:
                searches[name], students[name] = outlook, outlook.heaviest
            continue
        facts, own, notes = _shape_outlook(name, target, recipe, found, exporters)
        problems += own
        notices += notes
        if facts is not None:
            students[name] = facts
    problems += _merging_problems(recipe, students.values(), found.config)
    problems += parallel_problems(recipe, found.config, students)
    unaskable, unasked = task_outlook(recipe)
    problems, notices = problems + unaskable, notices + unasked
    engines, formats = engine_problems(recipe)
    problems += engines
    stages = stages_of(
        recipe,
        block_sizes=block_sizes(teacher_sizes["layers"], students, searches, score=recipe.score),
        engine_formats=formats,
    )
    hardware = detect()
    compensations = _compensations(recipe, found, teacher, students)
    notices += [f"students.{n}: {c.note(hardware)}" for n, c in compensations.items() if c.flops]
    stated = {n: t for n, t in recipe.students.items() if t.search is None and n in students}
    advice = advise(family, found.config, teacher_sizes, stated, on_gpu=hardware.is_gpu)
    problems += (refused := unservable(advice, recipe))
    counts = {name: outlook.candidates or 0 for name, outlook in searches.items()}
    corrected = trained_weights(recipe.correct, family, found.config)
    estimates = estimate_stages(
        stages,
        recipe,
        teacher,
        students,
        hardware,
        candidates=counts,
        corrected_weights=corrected,
        compensations=compensations,
    )
    estimates |= export_estimates(stages, exporters, teacher, students)
    disk, free = sum(e.disk_bytes for e in estimates.values()), free_disk_bytes(out)
    problems += disk_problems(disk, free, out)
    problems += memory_problems(estimates, hardware)
    return Plan(
        recipe=recipe,
        teacher_folder=found.folder,
        teacher_commit=found.commit,
        teacher=teacher,
        students=students,
        searches=searches,
        stages=stages,
        estimates=estimates,
        hardware=hardware,
        disk_bytes=disk,
        disk_free_bytes=free,
        # The recipe's own first; several students may meet the same.
        problems=tuple(sorted(dict.fromkeys(problems), key=lambda p: p.code.exit)),
        advice=tuple(a for a in advice if not (refused and a.rule == VLLM_HEAD_DIM)),
        notices=tuple(notices),
    )


def _compensations(
    recipe: Recipe, found: FoundTeacher, teacher: ModelFacts, students: Mapping[str, ModelFacts]
) -> dict[str, Compensation]:
    """What compensating each student takes; of a search, its heaviest candidate."""
    family = family_of(found.config)
    have = sizes(family, found.config)
    return {
        name: compensation_cost(
            recipe,
            teacher,
            facts,
            decide(family, found.config, sizes=have, new=facts.sizes, settings=recipe.compensate),
        )
        for name, facts in students.items()
    }


def _shape_outlook(
    name: str,
    target: Student,
    recipe: Recipe,
    found: FoundTeacher,
    exporters: Sequence[tuple[Any, Export]],
) -> tuple[ModelFacts | None, list[Problem], list[str]]:
    """A student of a stated shape, what is wrong with it, and what is to be said of it."""
    family, have = family_of(found.config), sizes(family_of(found.config), found.config)
    problems = list(target_problems(name, have, target, family=family, config=found.config))
    if problems:
        return None, problems, []
    size = student_sizes(have, target)
    kept = tuple(range(size["layers"])) if size["layers"] != have["layers"] else None
    try:
        config = with_sizes(family, found.config, size, kept_layers=kept)
    except ParetronError as error:
        return None, list(error.problems), []
    decision = decide(family, found.config, sizes=have, new=size, settings=recipe.compensate)
    problems += decision.problems
    if decision.untie:
        config["tie_word_embeddings"] = False
    problems += loss_problems(
        recipe.distill.loss,
        vocab=size["vocab"],
        teacher_layers=have["layers"],
        layers=size["layers"],
        apart=recipe.data.train.documents == "apart",
    )
    problems += export_problems(exporters, relabel(config), name)
    notes = [f"students.{name}: {note}" for note in decision.notes]
    return model_facts(config, dtype=student_dtype(recipe, found)), problems, notes


def _merging_problems(
    recipe: Recipe, students: Iterable[ModelFacts], config: Mapping[str, Any]
) -> list[Problem]:
    """Layers that are to be merged, and are of several kinds."""
    family = family_of(config)
    total = sizes(family, config)["layers"]
    if recipe.prune.layers == "drop" or all(s.sizes["layers"] == total for s in students):
        return []
    problem = merging_problem(family, config)
    return [problem] if problem is not None else []


def _outlook(
    name: str, search: Search, recipe: Recipe, found: FoundTeacher
) -> tuple[SearchOutlook | None, tuple[Problem, ...]]:
    from paretron.plan.searching import search_outlook  # counts by numpy, only when one searches

    return search_outlook(
        name, search, recipe, config=found.config, dtype=student_dtype(recipe, found)
    )


def student_dtype(recipe: Recipe, found: FoundTeacher) -> str:
    """What students are stored in, as safetensors names it: the recipe's, or the teacher's own."""
    return next((k for k, v in DTYPE_NAMES.items() if v == recipe.prune.dtype), found.dtype)


def block_sizes(
    teacher_layers: int,
    students: Mapping[str, ModelFacts],
    searches: Mapping[str, SearchOutlook],
    *,
    score: Score,
) -> tuple[int, ...]:
    """How many layers each depth student loses, in its first round, each number once."""
    stated = (facts for name, facts in students.items() if name not in searches)
    left = (score.after(1, have=teacher_layers, want=f.sizes["layers"]) for f in stated)
    lost = {teacher_layers - count for count in left}
    lost.update(*(found.lost_layers for found in searches.values()))
    return tuple(sorted(lost - {0}))


def find_exporters(recipe: Recipe) -> tuple[list[tuple[Any, Export]], list[Problem]]:
    """The exporter of every export, and a problem for each name that none has."""
    found: list[tuple[Any, Export]] = []
    problems: list[Problem] = []
    for k, export in enumerate(recipe.export):
        try:
            found.append((find_plugin(EXPORTERS, export.to, where=f"export.{k}.to"), export))
        except ParetronError as error:
            problems += error.problems
    return found, problems


def export_problems(
    exporters: Sequence[tuple[Any, Export]], config: Mapping[str, Any], student: str
) -> list[Problem]:
    """What keeps a student from being exported, by every exporter of the recipe."""
    problems = [p for e, export in exporters for p in e.problems(config, export=export)]
    return [replace(p, where=p.where or f"students.{student}") for p in dict.fromkeys(problems)]


def engine_problems(recipe: Recipe) -> tuple[list[Problem], frozenset[str]]:
    """What keeps an engine from running here, and the formats that the engines run."""
    problems: list[Problem] = []
    formats: set[str] = set()
    modes: dict[str, frozenset[str]] = {}
    exported = {e.label for e in recipe.export} | {"hf"}
    if recipe.profile is None:
        return [], frozenset()
    for k, settings in enumerate(recipe.profile.engines):
        where = f"profile.engines.{k}"
        try:
            engine = find_plugin(ENGINES, settings.name, where=f"{where}.name")
        except ParetronError as error:
            problems += error.problems
            continue
        problems += engine.check(settings)
        problems += address_problems(settings, models=(TEACHER, *recipe.students))
        formats.add(engine.wants)
        modes[settings.name] = engine.modes
        problems += batch_problems(
            recipe.profile, engine=settings.name, largest_batch=engine.largest_batch
        )
        if engine.wants not in exported:
            problems.append(
                Problem(
                    Code.RECIPE_VALUE,
                    f"{settings.name} runs the {engine.wants} export, which the recipe lacks",
                    where=where,
                    fix=f"add {{to: {engine.wants}}} to export",
                )
            )
    problems += mode_problems(recipe.profile, modes=modes)
    return problems, frozenset(formats)


def unservable(advice: Sequence[Advice], recipe: Recipe) -> list[Problem]:
    """What is only advice elsewhere, where the engine that refuses it is to be measured."""
    if recipe.profile is None or all(e.name != "vllm" for e in recipe.profile.engines):
        return []
    return [
        Problem(Code.UNSUPPORTED, a.finding, where=a.where, fix=a.better or "another engine")
        for a in advice
        if a.rule == VLLM_HEAD_DIM
    ]


def disk_problems(needed: int, free: int, out: Path) -> list[Problem]:
    """Too little room on the output's volume; what a run has written already need not be free."""
    if needed <= free + written_bytes(out):
        return []
    return [
        Problem(
            Code.DISK,
            f"{needed} bytes needed ({needed / 1e9:.1f} GB), {free} free ({free / 1e9:.1f} GB)",
            where=str(out),
            fix="free some space, or name an --out on a larger volume",
        )
    ]


def memory_problems(estimates: Mapping[str, Estimate], hardware: Hardware) -> list[Problem]:
    """Stages whose lower bound of memory is more than there is."""
    return [
        Problem(
            Code.MEMORY,
            f"needs about {e.memory_bytes / 1e9:.1f} GB, {hardware.name} has "
            f"{hardware.memory_bytes / 1e9:.1f} GB",
            where=name,
            fix="more processes, a sharded or offloaded `distill.teacher` if it is that, "
            "`compensate.refit: false` if it is pruning, or a machine with more memory",
        )
        for name, e in estimates.items()
        if e.memory_bytes > hardware.memory_bytes
    ]
