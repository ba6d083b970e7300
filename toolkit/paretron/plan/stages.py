"""The stages of a job: what each needs, which part of the recipe it depends on, in order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from paretron.plan.trial import trial_distill, trial_student
from paretron.recipe import Correct, Recipe, Search, Student
from paretron.recipe.training import CORRECTED

TEACHER, REPORT = "teacher", "report"


@dataclass(frozen=True)
class Stage:
    """One step of a run: it turns its inputs (role -> stage's name) into one artifact.

    `settings` is exactly the part of the recipe that its result depends on.
    """

    name: str
    kind: str
    inputs: Mapping[str, str]
    settings: Mapping[str, Any]
    student: str | None = None


def stages_of(
    recipe: Recipe, *, block_sizes: tuple[int, ...], engine_formats: frozenset[str]
) -> tuple[Stage, ...]:
    """Every stage that a recipe asks for, each after what it needs.

    `block_sizes` are the numbers of layers that students lose together; `engine_formats` are the
    exports that the profiled engines run, which the teacher needs too.
    """
    return tuple(_stages(recipe, block_sizes, engine_formats))


def _stages(
    recipe: Recipe, block_sizes: tuple[int, ...], engine_formats: frozenset[str]
) -> Iterator[Stage]:
    seed = {"seed": recipe.seed}
    yield Stage(TEACHER, "teacher", {}, _plain(recipe.teacher) | seed)
    for name, target in recipe.students.items():
        if target.search is not None:  # shapes first: nothing is scored or trained for them
            yield _shapes(name, target.search, recipe)
    yield Stage("data", "data", {"tokenizer": TEACHER},
                {"data": _texts(recipe), "tokens": token_limits(recipe)})  # fmt: skip
    teacher = TEACHER
    if (serial := recipe.serial_correction) is not None:
        alone = serial.model_copy(update={"trial": None})  # what is judged by it later
        yield Stage("correct", "correct", {"student": TEACHER, "data": "data"},
                    _training(alone, recipe) | seed)  # fmt: skip
        teacher = "correct"
    if (tried := trial_student(recipe)) is not None:
        yield from _trial(tried, recipe, block_sizes)
        teacher = "decide"
    yield _score("score", recipe, teacher, block_sizes)
    asked = teacher
    if recipe.distill.offline is not None:
        asked = "capture"
        yield Stage(asked, "capture", {"teacher": teacher, "data": "data"}, _captured(recipe))
    evaluated = {"teacher.final": teacher}
    if teacher != TEACHER:
        evaluated["teacher.uncorrected"] = TEACHER
    artifacts = {"teacher": {"hf": teacher}}
    for name, target in recipe.students.items():
        pruned, final = f"{name}.prune", f"{name}.distill"
        shape = {}
        if target.search is not None:
            yield _search(name, target.search, recipe, teacher)
            shape = {"search": f"{name}.search"}
        inputs = {"model": teacher, "scores": "score", "data": "data", **shape}
        yield Stage(pruned, "prune", inputs, _pruning(target, recipe), name)
        yield Stage(final, "distill", {"student": pruned, "teacher": asked, "data": "data"},
                    _training(recipe.distill, recipe) | _meanwhile(recipe) | seed,
                    name)  # fmt: skip
        evaluated |= {f"{name}.pruned": pruned, f"{name}.final": final}
        if recipe.parallel_correction is not None:
            evaluated[f"{name}.teacher"] = final  # the copy that lies below it
        artifacts[name] = {"hf": final}
    evaluations = {label: label.replace(".", ".evaluate-") for label in evaluated}
    for label, stage in evaluated.items():
        owner, _, which = label.partition(".")
        below = {"folder": CORRECTED} if which == "teacher" else {}
        # Tasks take hours: they are for the models that somebody may take.
        judged = recipe.evaluate if which == "final" else recipe.evaluate.without_tasks
        yield Stage(
            evaluations[label],
            "evaluate",
            {"model": stage, "data": "data"},
            {"evaluate": _plain(judged), "data": _plain(recipe.data)} | below,
            None if owner == "teacher" else owner,
        )
    for name, by_kind in artifacts.items():
        yield from _exports(name, recipe, by_kind, engine_formats)
    if recipe.profile is not None:
        yield Stage(
            "profile",
            "profile",
            {
                f"{name}.{kind}": stage
                for name, by_kind in artifacts.items()
                for kind, stage in by_kind.items()
                if kind in engine_formats
            },
            {"profile": _plain(recipe.profile)} | seed,
        )
    goals = {"goals": dict(recipe.goals)} if recipe.goals else {}
    yield Stage(REPORT, REPORT, _report_inputs(recipe, evaluations, artifacts), goals)


def _exports(
    name: str, recipe: Recipe, by_kind: dict[str, str], engine_formats: frozenset[str]
) -> Iterator[Stage]:
    """The exports of a model, each entered in `by_kind` by what tells it from the others."""
    checkpoint = by_kind["hf"]
    for export in recipe.export:
        # The teacher itself is served as it is; it is exported only to what engines need.
        if name == "teacher" and (export.label == "hf" or export.label not in engine_formats):
            continue
        stage = f"{name}.export-{export.label}"
        inputs: dict[str, str] = {"model": checkpoint}
        settings: dict[str, Any] = {"export": _plain(export)}
        if export.quantize is not None:  # calibrated on a text, and judged on another
            inputs |= {"data": "data"}
            settings |= {
                "calibration": _plain(recipe.data.calibration),
                "validation": {"seq_len": recipe.data.validation.seq_len},
                "seed": recipe.seed,
            }
        yield Stage(stage, "export", inputs, settings, None if name == "teacher" else name)
        by_kind[export.label] = stage


def _trial(name: str, recipe: Recipe, block_sizes: tuple[int, ...]) -> Iterator[Stage]:
    """A student's short distillation by the teacher as it is and as corrected; which one goes on.

    The student is cut from the teacher as it is: only who teaches differs.
    """
    yield _score("trial.score", recipe, TEACHER, block_sizes)
    yield Stage("trial.prune", "prune",
                {"model": TEACHER, "scores": "trial.score", "data": "data"},
                _pruning(recipe.students[name], recipe), name)  # fmt: skip
    settings = _training(trial_distill(recipe), recipe) | {"seed": recipe.seed}
    for trial, asked in (("trial.without", TEACHER), ("trial.with", "correct")):
        inputs = {"student": "trial.prune", "teacher": asked, "data": "data"}
        yield Stage(trial, "trial", inputs, settings, name)
    yield Stage("decide", "decide",
                {"without": "trial.without", "with": "trial.with",
                 "uncorrected": TEACHER, "corrected": "correct"}, {}, name)  # fmt: skip


def _pruning(target: Student, recipe: Recipe) -> dict[str, Any]:
    return {
        "student": _plain(target),
        "prune": _plain(recipe.prune),
        "score": _plain(recipe.score),
        "compensate": _plain(recipe.compensate),
        "calibration": _plain(recipe.data.calibration),
        "seed": recipe.seed,
    }


def _score(name: str, recipe: Recipe, teacher: str, block_sizes: tuple[int, ...]) -> Stage:
    return Stage(
        name,
        "score",
        {"model": teacher, "data": "data"},
        {
            "score": _plain(recipe.score),
            "calibration": _plain(recipe.data.calibration),
            "block_sizes": list(block_sizes),
            "seed": recipe.seed,
        },
    )


def _shapes(name: str, search: Search, recipe: Recipe) -> Stage:
    return Stage(
        f"{name}.shapes",
        "shapes",
        {"model": TEACHER},
        {
            "search": _plain(search, only=("space", "budget", "widest", "max_candidates")),
            "dtype": recipe.prune.dtype,
            # Both say which shapes are no candidates.
            "export": [_plain(e) for e in recipe.export],
            "engines": [e.name for e in recipe.profile.engines] if recipe.profile else [],
        },
        name,
    )


def _search(name: str, search: Search, recipe: Recipe, teacher: str) -> Stage:
    return Stage(
        f"{name}.search",
        "search",
        {"model": teacher, "scores": "score", "data": "data", "shapes": f"{name}.shapes"},
        {
            "search": _plain(search, only=("samples", "keep", "rounds")),
            "prune": _plain(recipe.prune),
            "score": _plain(recipe.score),
            "compensate": _plain(recipe.compensate),
            "calibration": _plain(recipe.data.calibration),
            "seed": recipe.seed,
            **_training(recipe.distill, recipe),
        },
        name,
    )


def captured_seq_len(recipe: Recipe) -> int:
    """The length of the windows that an offline teacher is asked about."""
    phases = recipe.distill.phases
    return phases[0].seq_len if phases else recipe.data.train.seq_len


def _captured(recipe: Recipe) -> dict[str, Any]:
    """What is captured of a teacher depends on less than what is learned from it."""
    distill, kept = recipe.distill, {}
    if distill.offline == "top_k":
        kept = {"top_k": distill.loss.top_k, "temperature": distill.loss.temperature}
    return {
        "capture": {"offline": distill.offline, "dtype": distill.dtype, **kept},
        "seq_len": captured_seq_len(recipe),
        "documents": recipe.data.train.documents,
    }


def _texts(recipe: Recipe) -> dict[str, Any]:
    """What decides which tokens a text holds; how they are read as windows does not."""
    read = {"seq_len", "samples", "documents"}
    return {name: source.model_dump(mode="json", exclude=read) for name, source in recipe.data}


def token_limits(recipe: Recipe) -> dict[str, int | None]:
    """How many tokens of each text are kept: as stated, else what training can use; None is all."""
    searches = (s.search for s in recipe.students.values() if s.search)
    rounds = (tokens for search in searches for tokens in search.rounds)
    tried = recipe.correct.trial.tokens if recipe.correct and recipe.correct.trial else 0
    corrected = recipe.correct.tokens if recipe.correct else 0
    used = max(recipe.distill.tokens, corrected, tried, *rounds)
    stated = {name: source.tokens for name, source in recipe.data}
    return stated | {"train": stated["train"] or used}


def _report_inputs(
    recipe: Recipe, evaluations: Mapping[str, str], artifacts: Mapping[str, Mapping[str, str]]
) -> dict[str, str]:
    inputs = {f"evaluation.{label}": stage for label, stage in evaluations.items()}
    inputs["scores"] = "score"
    for name, by_kind in artifacts.items():
        inputs |= {f"artifact.{name}.{kind}": stage for kind, stage in by_kind.items()}
    if recipe.serial_correction is not None:
        inputs["curve.correct"] = "correct"
    inputs |= {f"curve.{name}": f"{name}.distill" for name in recipe.students}
    inputs |= {f"pruned.{name}": f"{name}.prune" for name in recipe.students}
    if recipe.profile is not None:
        inputs["profile"] = "profile"
    return inputs


def _training(section: BaseModel, recipe: Recipe) -> dict[str, Any]:
    return {
        "training": _plain(section),
        "train": recipe.data.train.model_dump(mode="json", include={"seq_len", "documents"}),
        "validation": {"seq_len": recipe.data.validation.seq_len},
    }


def _meanwhile(recipe: Recipe) -> dict[str, Any]:
    """What a teacher that is corrected along adds to a distillation's settings."""
    correct = recipe.parallel_correction
    if correct is None:
        return {}
    own = correct.model_dump(mode="json", exclude={*Correct.OF_DISTILL, "trial"})
    return {"correct": own}


def _plain(section: BaseModel, *, only: tuple[str, ...] | None = None) -> dict[str, Any]:
    return section.model_dump(mode="json", by_alias=True, include=set(only) if only else None)
