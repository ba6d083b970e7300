"""A rehearsal: the whole recipe on a two-layer twin of its teacher, through the same code."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

from paretron.artifacts.staging import refuse_existing
from paretron.errors import raise_all
from paretron.families import Sizes, family_of, sizes
from paretron.families.table import with_sizes
from paretron.plan.plan import make_plan
from paretron.plan.shapes import student_sizes
from paretron.plan.sources import find_teacher
from paretron.recipe import Profile, Recipe, Student, Training
from paretron.run.events import Watcher
from paretron.run.runner import run_plan
from paretron.run.stages import STAGES

STAMP = "TEST"
LAYERS, HEADS, HIDDEN, STEP = 2, 2, 128, 16  # the twin: sizes are multiples of STEP
SEQ_LEN, WINDOWS, STEPS = 64, 64, 3

T = TypeVar("T", bound=Training)


def check_recipe(
    recipe: Recipe, *, out: Path | None, offline: bool, watcher: Watcher | None
) -> tuple[str, ...]:
    """Rehearse a recipe and return the stages that ran; the first failure is raised.

    The recipe's own problems come first. Everything written is stamped TEST, and removed
    afterwards unless `out` is named.
    """
    if out is not None:
        refuse_existing(out, overwrite=False)  # a rehearsal never replaces the real thing
    with ExitStack() as stack:
        folder = out or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="paretron-")))
        raise_all(make_plan(recipe, out=folder, offline=offline).problems)
        twin = twin_recipe(recipe, folder=folder, offline=offline)
        plan = make_plan(twin, out=folder, offline=offline)
        run_plan(plan, folder, stages=STAGES, overwrite=True, stamp=STAMP, watcher=watcher)
        return tuple(stage.name for stage in plan.stages)


def twin_recipe(recipe: Recipe, *, folder: Path, offline: bool) -> Recipe:
    """The recipe with a two-layer teacher (written under `folder`) and work for seconds."""
    found = find_teacher(recipe, offline=offline)
    config = twin_config(found.config)
    family = family_of(found.config)
    real, tiny = sizes(family, found.config), sizes(family, config)
    students = {
        name: twin_student(target, real=real, tiny=tiny) for name, target in recipe.students.items()
    }
    if recipe.teacher.pretrain is not None:
        pretrain = _short(recipe.teacher.pretrain)
        text = pretrain.data.model_copy(update={"seq_len": SEQ_LEN, "tokens": WINDOWS * SEQ_LEN})
        pretrain = pretrain.model_copy(update={"config": config, "data": text})
        teacher = recipe.teacher.model_copy(update={"pretrain": pretrain})
    else:
        from paretron.run.pretrain import write_random_model

        if found.folder is None:
            raise ValueError("a given teacher has a folder")
        place = folder / "twin-teacher"
        write_random_model(
            config, place, companions=found.folder, dtype=found.dtype, seed=recipe.seed, stamp=STAMP
        )
        teacher = recipe.teacher.model_copy(update={"model": str(place)})
    return recipe.model_copy(
        update={
            "teacher": teacher,
            "students": students,
            "data": _little_text(recipe),
            "correct": _short(recipe.correct) if recipe.correct else None,
            "distill": _short(recipe.distill),
            "score": _little_scoring(recipe),
            "profile": _little_profile(recipe.profile) if recipe.profile else None,
        }
    )


def twin_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Two layers of the same family, head_dim and vocabulary; all else shrunk in proportion."""
    family = family_of(config)
    size = sizes(family, config)
    share = min(1.0, HIDDEN / size["hidden"])
    new = size | {
        "layers": min(LAYERS, size["layers"]),
        "kv_heads": min(HEADS, size["kv_heads"]),
        "q_per_kv": min(HEADS, size["q_per_kv"]),
        "hidden": _multiple(size["hidden"] * share, at_least=2 * STEP),
        "ffn": _multiple(size["ffn"] * share, at_least=2 * STEP),
    }
    kept = tuple(range(new["layers"]))
    return with_sizes(family, config, new, kept_layers=kept)


def twin_student(target: Student, *, real: Sizes, tiny: Sizes) -> Student:
    """The twin's target: every axis that shrinks in the recipe shrinks here too."""
    wanted = student_sizes(real, target)
    new: dict[str, int] = {}
    for axis in ("hidden", "ffn"):
        if wanted[axis] < real[axis]:
            share = wanted[axis] / real[axis]
            size = _multiple(tiny[axis] * share, at_least=STEP)
            new[axis] = min(size, tiny[axis] - STEP)
    if wanted["layers"] < real["layers"]:
        new["layers"] = 1
    kv_heads = 1 if wanted["kv_heads"] < real["kv_heads"] else tiny["kv_heads"]
    q_per_kv = 1 if wanted["q_per_kv"] < real["q_per_kv"] else tiny["q_per_kv"]
    if kv_heads < tiny["kv_heads"]:
        new["kv_heads"] = kv_heads
    if kv_heads * q_per_kv < tiny["kv_heads"] * tiny["q_per_kv"]:
        new["heads"] = kv_heads * q_per_kv
    return Student(**new)


def _multiple(size: float, *, at_least: int) -> int:
    return max(at_least, round(size / STEP) * STEP)


def _short(training: T) -> T:
    """A few steps, with accumulation and several processes where the recipe has them."""
    micro, processes = min(2, training.micro_batch), min(2, training.processes)
    accumulates = training.global_batch > training.micro_batch * training.processes
    batch = micro * processes * (2 if accumulates else 1)
    return training.model_copy(
        update={
            "micro_batch": micro,
            "processes": processes,
            "global_batch": batch,
            "tokens": STEPS * batch * SEQ_LEN,
            "warmup_steps": 1,
            "checkpoint_every": 2,
            "eval_every": 2,
        }
    )


def _little_text(recipe: Recipe) -> Any:
    data = recipe.data
    few = {"seq_len": SEQ_LEN, "tokens": WINDOWS * SEQ_LEN}
    return data.model_copy(
        update={
            "calibration": data.calibration.model_copy(update=few | {"samples": 8}),
            "train": data.train.model_copy(update=few),
            "validation": data.validation.model_copy(update=few),
        }
    )


def _little_scoring(recipe: Recipe) -> Any:
    depth = recipe.score.depth
    few = depth.model_copy(update={"samples": min(4, depth.samples)})
    return recipe.score.model_copy(update={"depth": few})


def _little_profile(profile: Profile) -> Profile:
    return profile.model_copy(
        update={"batches": (1,), "lengths": ((8, 4),), "repeats": 1, "warmup": 0}
    )
