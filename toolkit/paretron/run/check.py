"""A rehearsal: the whole recipe on a two-layer twin of its teacher, through the same code."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

from paretron.artifacts.staging import refuse_existing, refuse_overlap
from paretron.data.taskfiles import asked_tasks
from paretron.errors import raise_all
from paretron.families import Sizes, family_of, sizes
from paretron.families.experts import PER_TOKEN, is_moe_layer
from paretron.families.table import with_sizes
from paretron.plan.plan import make_plan
from paretron.plan.shapes import student_sizes
from paretron.plan.sources import find_teacher
from paretron.plan.stages import TEACHER
from paretron.recipe import Correct, Distill, Evaluate, Profile, Recipe, Search, Student, Training
from paretron.recipe.training import Phase
from paretron.run.events import Watcher
from paretron.run.runner import run_plan
from paretron.run.stages import STAGES

STAMP = "TEST"
LAYERS, HEADS, HIDDEN, STEP = 2, 2, 128, 16  # the twin: sizes are multiples of STEP
SEQ_LEN, WINDOWS, STEPS = 64, 64, 3
QUESTIONS = 2  # of each task

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
        real = make_plan(recipe, out=folder, offline=offline)
        if real.teacher_folder is not None:
            refuse_overlap(folder, real.teacher_folder)
        raise_all(real.problems)
        if watcher is not None:
            for notice in real.notices:
                watcher(TEACHER, "notice", {"message": notice})
        twin = twin_recipe(real.recipe, folder=folder, offline=offline)
        plan = make_plan(twin, out=folder, offline=offline)
        run_plan(
            plan, folder, stages=STAGES, offline=offline, overwrite=True, stamp=STAMP,
            watcher=watcher,
        )  # fmt: skip
        return tuple(stage.name for stage in plan.stages)


def twin_recipe(recipe: Recipe, *, folder: Path, offline: bool) -> Recipe:
    """The recipe with a two-layer teacher (written under `folder`) and work for seconds."""
    found = find_teacher(recipe, offline=offline)
    config = twin_config(found.config)
    family = family_of(found.config)
    real, tiny = sizes(family, found.config), sizes(family, config)
    students = {
        name: twin_student(target, real=real, tiny=tiny)
        if target.search is None
        else Student(search=twin_search(target.search, tiny=tiny, distill=_short(recipe.distill)))
        for name, target in recipe.students.items()
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
            "correct": _short_correction(recipe),
            "distill": _short(recipe.distill),
            "score": _little_scoring(recipe),
            "evaluate": _little_evaluation(recipe.evaluate),
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
    }
    for axis in {"ffn", "moe_ffn"} & size.keys():
        new[axis] = _multiple(size[axis] * share, at_least=2 * STEP)
    if "experts" in size:
        new["experts"] = min(size["experts"], 2 * config[PER_TOKEN])
    kept = _twin_layers(config, size, new["layers"])
    twin = with_sizes(family, config, new, kept_layers=kept)
    if family.longrope_lists:  # as long as the real widths: the twin does without long contexts
        twin = {k: v for k, v in twin.items() if k not in ("rope_scaling", "rope_parameters")}
    return twin


def _twin_layers(config: Mapping[str, Any], size: Sizes, count: int) -> tuple[int, ...]:
    """The first layers, or the first of either kind where some have experts and some do not."""
    first: dict[bool, int] = {}
    for i in range(size["layers"]):
        first.setdefault("experts" in size and is_moe_layer(config, i), i)
    return tuple(sorted(first.values())) if len(first) == count else tuple(range(count))


def twin_student(target: Student, *, real: Sizes, tiny: Sizes) -> Student:
    """The twin's target: every axis that shrinks in the recipe shrinks here too."""
    wanted = student_sizes(real, target)
    new: dict[str, int] = {}
    for axis in ("hidden", "ffn", "moe_ffn"):
        if axis in tiny and wanted[axis] < real[axis]:
            share = wanted[axis] / real[axis]
            size = _multiple(tiny[axis] * share, at_least=STEP)
            new[axis] = min(size, tiny[axis] - STEP)
    if wanted["layers"] < real["layers"]:
        new["layers"] = 1
    if "experts" in tiny and wanted["experts"] < real["experts"]:
        new["experts"] = tiny["experts"] - 1
    kv_heads = 1 if wanted["kv_heads"] < real["kv_heads"] else tiny["kv_heads"]
    q_per_kv = 1 if wanted["q_per_kv"] < real["q_per_kv"] else tiny["q_per_kv"]
    if kv_heads < tiny["kv_heads"]:
        new["kv_heads"] = kv_heads
    if kv_heads * q_per_kv < tiny["kv_heads"] * tiny["q_per_kv"]:
        new["heads"] = kv_heads * q_per_kv
    return Student.model_validate(new)


def twin_search(search: Search, *, tiny: Sizes, distill: Training) -> Search:
    """Two sizes on every axis that is searched and no bound that matters, one round of a step."""
    heads = tiny["kv_heads"] * tiny["q_per_kv"]
    smaller = {"layers": 1, "kv_heads": 1, "heads": tiny["kv_heads"]}
    smaller |= {axis: tiny[axis] - STEP for axis in ("hidden", "ffn", "moe_ffn") if axis in tiny}
    full = {**tiny, "heads": heads}
    # Depth always, so that there is a smaller shape even where the twin's heads are all needed.
    axes = {axis: full[axis] for axis in (*search.space.axes(), "layers")}
    space = {axis: [min(smaller.get(axis, n), n), n] for axis, n in axes.items()}
    loose = {"at_most": 1e18}
    bounds: dict[str, Any] = {
        "memory": {"bytes": loose},
        "flops": {"per_token": loose},
        "speed": {"ms": 1e9, "lengths": (8, 4), "repeats": 1},
    }
    stated = search.budget.model_dump(exclude_none=True)
    return Search.model_validate(
        {
            "space": space,
            "budget": {measure: bounds.get(measure, loose) for measure in stated},
            "samples": 2,
            "keep": 2,
            "rounds": [distill.global_batch * SEQ_LEN] if search.rounds else [],
        }
    )


def _multiple(size: float, *, at_least: int) -> int:
    return max(at_least, round(size / STEP) * STEP)


def _short(training: T) -> T:
    """A few steps, with accumulation and several processes where the recipe has them."""
    micro, shares = min(2, training.micro_batch), min(2, training.shares)
    accumulates = training.global_batch > training.micro_batch * training.shares
    batch = micro * shares * (2 if accumulates else 1)
    tokens = STEPS * batch * SEQ_LEN
    phases = {}
    if isinstance(training, Distill) and training.phases:
        # As many of them, the last one in longer windows.
        count = len(training.phases)
        lengths = [SEQ_LEN] * (count - 1) + [2 * SEQ_LEN]
        tokens = STEPS * batch * sum(lengths)
        phases = {"phases": tuple(Phase(seq_len=n, tokens=STEPS * batch * n) for n in lengths)}
    return training.model_copy(
        update=phases
        | {
            "micro_batch": micro,
            "processes": shares * training.tensor_parallel,
            "global_batch": batch,
            "tokens": tokens,
            "warmup_steps": 1,
            "checkpoint_every": 2,
            "eval_every": 2,
        }
    )


def _short_correction(recipe: Recipe) -> Correct | None:
    correct = recipe.parallel_correction
    if correct is not None:  # ends a step before the student does where it ends before
        step = _short(recipe.distill).global_batch * SEQ_LEN
        steps = STEPS - (correct.tokens < recipe.distill.tokens)
        return _short(correct).model_copy(update={"tokens": steps * step})
    if recipe.correct is None or recipe.correct.trial is None:
        return _short(recipe.correct) if recipe.correct else None
    step = _short(recipe.distill).global_batch * SEQ_LEN
    trial = recipe.correct.trial.model_copy(update={"tokens": STEPS * step})
    return _short(recipe.correct).model_copy(update={"trial": trial})


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


def _little_evaluation(evaluate: Evaluate) -> Evaluate:
    stride = evaluate.stride and min(evaluate.stride, SEQ_LEN // 2)
    # What a suite would leave out is left out, not refused for being named.
    tasks = [task.model_copy(update={"limit": QUESTIONS}) for task in asked_tasks(evaluate)[0]]
    few = {"stride": stride, "tasks": tuple(tasks), "suite": None}
    return evaluate.model_copy(update=few)


def _little_profile(profile: Profile) -> Profile | None:
    """One light load of each mode; without servers that run already, which do not serve the twin.

    Loops go with them: who else could be put under one is not known here.
    """
    engines = tuple(e for e in profile.engines if not e.servers)
    loops = len(engines) == len(profile.engines)
    update = {
        "engines": engines,
        "batches": (1,) if profile.batches or not loops else (),
        "concurrency": (2,) if profile.concurrency and loops else (),
        "rates": (8.0,) if profile.rates and loops else (),
        "requests": 4,
        "lengths": ((8, 4),),
        "repeats": 1,
        "warmup": 0,
        "min_seconds": 0.0,
    }
    return profile.model_copy(update=update) if engines else None
