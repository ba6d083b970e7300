"""The plan of a recipe: what it will make, what that costs, and every problem at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from paretron.artifacts.config import DTYPE_NAMES, relabel
from paretron.errors import Code, ParetronError, Problem
from paretron.families import family_of, sizes
from paretron.families.table import with_sizes
from paretron.plan.cost import ModelFacts, model_facts
from paretron.plan.estimate import Estimate, estimate_stages
from paretron.plan.hardware import Hardware, detect, free_disk_bytes, written_bytes
from paretron.plan.shapes import student_sizes, target_problems
from paretron.plan.sources import data_problems, find_teacher
from paretron.plan.stages import Stage, stages_of
from paretron.plugins import ENGINES, EXPORTERS, find_plugin
from paretron.recipe import Export, Recipe
from paretron.recipe.limits import batch_problems


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

    def as_json(self) -> dict[str, Any]:
        """The stable form of `plan --json`."""
        return {
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
            "problems": [p.as_json() for p in self.problems],
        }


def make_plan(recipe: Recipe, *, out: Path, offline: bool) -> Plan:
    """Plan a recipe without reading a weight or tokenising a text.

    Problems are collected; only a teacher whose config cannot be read ends the planning.
    """
    found = find_teacher(recipe, offline=offline)
    problems = [*found.problems, *data_problems(recipe, found.config)]
    family = family_of(found.config)
    teacher_sizes = sizes(family, found.config)
    teacher = model_facts(found.config, dtype=found.dtype)
    exporters, unknown = find_exporters(recipe)
    problems += unknown
    students: dict[str, ModelFacts] = {}
    for name, target in recipe.students.items():
        own = target_problems(name, teacher_sizes, target, family=family, config=found.config)
        problems += own
        if own:
            continue
        size = student_sizes(teacher_sizes, target)
        kept = tuple(range(size["layers"])) if size["layers"] != teacher_sizes["layers"] else None
        try:
            config = with_sizes(family, found.config, size, kept_layers=kept)
        except ParetronError as error:
            problems += error.problems
            continue
        dtype = next((k for k, v in DTYPE_NAMES.items() if v == recipe.prune.dtype), found.dtype)
        students[name] = model_facts(config, dtype=dtype)
        problems += export_problems(exporters, relabel(config), name)
    engines, formats = engine_problems(recipe)
    problems += engines
    stages = stages_of(
        recipe,
        block_sizes=block_sizes(teacher_sizes["layers"], students),
        engine_formats=formats,
    )
    hardware = detect()
    estimates = estimate_stages(stages, recipe, teacher, students, hardware)
    disk, free = sum(e.disk_bytes for e in estimates.values()), free_disk_bytes(out)
    if disk > free + written_bytes(out):  # what a run has written already need not be free
        problems.append(
            Problem(
                Code.DISK,
                f"{disk} bytes needed, {free} free",
                where=str(out),
                fix="free some space, or name an --out on a larger volume",
            )
        )
    problems += memory_problems(estimates, hardware)
    return Plan(
        recipe=recipe,
        teacher_folder=found.folder,
        teacher_commit=found.commit,
        teacher=teacher,
        students=students,
        stages=stages,
        estimates=estimates,
        hardware=hardware,
        disk_bytes=disk,
        disk_free_bytes=free,
        problems=tuple(sorted(problems, key=lambda p: p.code.exit)),  # the recipe's own first
    )


def block_sizes(teacher_layers: int, students: Mapping[str, ModelFacts]) -> tuple[int, ...]:
    """How many layers each depth student loses, each number once."""
    lost = {teacher_layers - facts.sizes["layers"] for facts in students.values()}
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
    exporters: list[tuple[Any, Export]], config: Mapping[str, Any], student: str
) -> list[Problem]:
    """What keeps a student from being exported, by every exporter of the recipe."""
    problems = [p for e, export in exporters for p in e.problems(config, export=export)]
    return [replace(p, where=p.where or f"students.{student}") for p in dict.fromkeys(problems)]


def engine_problems(recipe: Recipe) -> tuple[list[Problem], frozenset[str]]:
    """What keeps an engine from running here, and the formats that the engines run."""
    problems: list[Problem] = []
    formats: set[str] = set()
    exported = {e.to for e in recipe.export} | {"hf"}
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
        formats.add(engine.wants)
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
    return problems, frozenset(formats)


def memory_problems(estimates: Mapping[str, Estimate], hardware: Hardware) -> list[Problem]:
    """Stages whose lower bound of memory is more than there is."""
    return [
        Problem(
            Code.MEMORY,
            f"needs about {e.memory_bytes / 1e9:.1f} GB, {hardware.name} has "
            f"{hardware.memory_bytes / 1e9:.1f} GB",
            where=name,
            fix="more processes, or a machine with more memory",
        )
        for name, e in estimates.items()
        if e.memory_bytes > hardware.memory_bytes
    ]
