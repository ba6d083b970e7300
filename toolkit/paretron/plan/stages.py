"""The stages of a job: what each needs, which part of the recipe it depends on, in order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from paretron.recipe import Recipe, Search

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
                {"data": _plain(recipe.data), "tokens": token_limits(recipe)})  # fmt: skip
    teacher = TEACHER
    if recipe.correct is not None:
        yield Stage("correct", "correct", {"student": TEACHER, "data": "data"},
                    _training(recipe.correct, recipe) | seed)  # fmt: skip
        teacher = "correct"
    yield _score(recipe, teacher, block_sizes)
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
        yield Stage(
            pruned,
            "prune",
            {"model": teacher, "scores": "score", "data": "data", **shape},
            {
                "student": _plain(target),
                "prune": _plain(recipe.prune),
                "score": _plain(recipe.score),
                "compensate": _plain(recipe.compensate),
                "calibration": _plain(recipe.data.calibration),
            }
            | seed,
            name,
        )
        yield Stage(final, "distill", {"student": pruned, "teacher": asked, "data": "data"},
                    _training(recipe.distill, recipe) | seed, name)  # fmt: skip
        evaluated |= {f"{name}.pruned": pruned, f"{name}.final": final}
        artifacts[name] = {"hf": final}
    evaluations = {label: label.replace(".", ".evaluate-") for label in evaluated}
    for label, stage in evaluated.items():
        owner = label.partition(".")[0]
        yield Stage(
            evaluations[label],
            "evaluate",
            {"model": stage, "data": "data"},
            {"evaluate": _plain(recipe.evaluate), "data": _plain(recipe.data)},
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
    yield Stage(REPORT, REPORT, _report_inputs(recipe, evaluations, artifacts), {})


def _exports(
    name: str, recipe: Recipe, by_kind: dict[str, str], engine_formats: frozenset[str]
) -> Iterator[Stage]:
    """The exports of a model, each entered in `by_kind` for those after it."""
    for export in recipe.export:
        # The teacher itself is served as it is; it is exported only to what engines need.
        if name == "teacher" and (export.to == "hf" or export.to not in engine_formats):
            continue
        stage = f"{name}.export-{export.to}"
        yield Stage(
            stage,
            "export",
            {"model": by_kind["hf"]},
            {"export": _plain(export)},
            None if name == "teacher" else name,
        )
        by_kind[export.to] = stage


def _score(recipe: Recipe, teacher: str, block_sizes: tuple[int, ...]) -> Stage:
    return Stage(
        "score",
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


def token_limits(recipe: Recipe) -> dict[str, int | None]:
    """How many tokens of each text are kept: as stated, else what training can use; None is all."""
    searches = (s.search for s in recipe.students.values() if s.search)
    rounds = (tokens for search in searches for tokens in search.rounds)
    used = max(recipe.distill.tokens, recipe.correct.tokens if recipe.correct else 0, *rounds)
    stated = {name: source.tokens for name, source in recipe.data}
    return stated | {"train": stated["train"] or used}


def _report_inputs(
    recipe: Recipe, evaluations: Mapping[str, str], artifacts: Mapping[str, Mapping[str, str]]
) -> dict[str, str]:
    inputs = {f"evaluation.{label}": stage for label, stage in evaluations.items()}
    for name, by_kind in artifacts.items():
        inputs |= {f"artifact.{name}.{kind}": stage for kind, stage in by_kind.items()}
    if recipe.correct is not None:
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


def _plain(section: BaseModel, *, only: tuple[str, ...] | None = None) -> dict[str, Any]:
    return section.model_dump(mode="json", by_alias=True, include=set(only) if only else None)
