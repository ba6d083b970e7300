"""A recipe's inputs as planning sees them: the teacher's config and headers, the texts' files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from paretron.artifacts.config import DTYPE_NAMES, read_config
from paretron.artifacts.hub import locate
from paretron.artifacts.reader import INDEX, SINGLE, Checkpoint
from paretron.artifacts.tokenizer import tokenizer_problems
from paretron.data.datasets import find_dataset
from paretron.data.sources import source_files
from paretron.errors import Code, ParetronError, Problem
from paretron.families import explicit, family_of
from paretron.plan.trial import trial_distill, trial_student
from paretron.recipe import Recipe, TextSource, TokenisedSource, Training
from paretron.recipe.training import Phase

Text = TypeVar("Text", bound=TextSource)
_PRETRAIN = "teacher.pretrain.data"


@dataclass(frozen=True)
class FoundTeacher:
    """A teacher's config, where it lies, its safetensors dtype, and what is wrong with it."""

    config: dict[str, Any]
    folder: Path | None
    commit: str | None
    dtype: str
    problems: tuple[Problem, ...] = ()
    notices: tuple[str, ...] = ()


def find_teacher(recipe: Recipe, *, offline: bool) -> FoundTeacher:
    """The teacher of a recipe, from its config and, when they are on disk, its headers.

    Raises when there is no config to plan with; all else is a problem beside the counts.
    """
    if recipe.teacher.pretrain is not None:
        return _pretrained(recipe)
    assert recipe.teacher.model is not None  # by the recipe's own check
    located = locate(
        recipe.teacher.model, revision=recipe.teacher.revision, offline=offline, weights=False
    )
    config = read_config(located.folder)
    named = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    dtype = next((k for k, v in DTYPE_NAMES.items() if v == named), "BF16")
    problems: list[Problem] = []
    notices: tuple[str, ...] = ()
    from_hub = located.commit is not None
    here = any((located.folder / name).is_file() for name in (INDEX, SINGLE))
    if here or not from_hub:  # a hub's weights come when the run starts
        try:
            checkpoint = Checkpoint.open(located.folder)
            dtype, notices = checkpoint.dtype, checkpoint.notices
        except ParetronError as error:
            if not from_hub:  # an unfinished download goes on when the run starts
                problems += error.problems
        problems += tokenizer_problems(located.folder, vocab=config["vocab_size"])
    return FoundTeacher(config, located.folder, located.commit, dtype, tuple(problems), notices)


def _pretrained(recipe: Recipe) -> FoundTeacher:
    pretrain = recipe.teacher.pretrain
    assert pretrain is not None
    config = pretrain.config | {"vocab_size": pretrain.tokenizer.vocab_size}
    try:
        config = explicit(family_of(config), config)
    except ParetronError as error:
        raise ParetronError(
            *(
                Problem(
                    Code.RECIPE_VALUE,
                    p.cause,
                    fix=p.fix,
                    where=p.where.replace("config.json: ", "teacher.pretrain.config."),
                )
                for p in error.problems
            )
        ) from error
    return FoundTeacher(config, None, None, "F32")


def data_problems(recipe: Recipe, config: Mapping[str, Any]) -> list[Problem]:
    """Texts whose files are absent or empty, and windows longer than the model's context."""
    problems: list[Problem] = []
    texts = _texts(recipe)
    lengths = {f"{where}.seq_len": text.seq_len for where, text in texts.items()}
    phases = recipe.distill.phases
    lengths |= {f"distill.phases.{k}.seq_len": phase.seq_len for k, phase in enumerate(phases)}
    longest = config.get("max_position_embeddings")
    for where, seq_len in lengths.items():
        if isinstance(longest, int) and seq_len > longest:
            cause = f"{seq_len} is longer than the teacher's context of {longest}"
            problems.append(_value(cause, where=where, fix=f"at most {longest}"))
    for where, text in texts.items():
        for key, source in _parts(where, text):
            problems += _file_problems(key, source)
    return problems + _step_problems(recipe)


def _step_problems(recipe: Recipe) -> list[Problem]:
    """Trainings, and phases of them, of fewer tokens than one step; phases longer than the text."""
    pretrain, distill = recipe.teacher.pretrain, recipe.distill
    seq_len = recipe.data.train.seq_len
    trainings: list[tuple[str, Training | None, int]] = [
        ("correct", recipe.serial_correction, seq_len),
        ("teacher.pretrain", pretrain, pretrain.data.seq_len if pretrain else 0),
    ]
    steps = [(n, t.tokens, t.global_batch * length) for n, t, length in trainings if t is not None]
    if trial_student(recipe) is not None:
        tried = trial_distill(recipe)
        steps.append(("correct.trial", tried.tokens, tried.global_batch * seq_len))
    if recipe.parallel_correction is not None:
        first = distill.phases[0] if distill.phases else Phase(seq_len=seq_len, tokens=1)
        step = (first.global_batch or distill.global_batch) * first.seq_len
        steps.append(("correct", recipe.parallel_correction.tokens, step))
    if not distill.phases:
        steps.append(("distill", distill.tokens, distill.global_batch * seq_len))
    for k, phase in enumerate(distill.phases):
        step = (phase.global_batch or distill.global_batch) * phase.seq_len
        steps.append((f"distill.phases.{k}", phase.tokens, step))
    problems = [
        _value(
            f"{tokens} tokens are less than one step of {step}",
            where=f"{name}.tokens",
            fix="more tokens, or a smaller global_batch",
        )
        for name, tokens, step in steps
        if tokens < step
    ]
    kept = recipe.data.train.tokens
    for k, phase in enumerate(distill.phases):
        if kept is not None and kept < phase.seq_len:
            cause = f"{phase.seq_len} tokens a window, but the text is cut after {kept}"
            where = f"distill.phases.{k}.seq_len"
            problems.append(_value(cause, where=where, fix="more of data.train.tokens"))
    return problems


def _value(cause: str, *, where: str, fix: str) -> Problem:
    return Problem(Code.RECIPE_VALUE, cause, where=where, fix=fix)


def pinned(recipe: Recipe, *, offline: bool) -> tuple[Recipe, list[Problem]]:
    """The recipe with every hub dataset at the commit that its revision stands for now.

    Nothing is downloaded but the datasets' cards; what a dataset lacks is a problem.
    """
    problems: list[Problem] = []

    def at_commit(where: str, source: Text) -> Text:
        if isinstance(source, TokenisedSource) and source.sources:
            parts = (at_commit(key, part) for key, part in _parts(where, source))
            return source.model_copy(update={"sources": tuple(parts)})
        if source.dataset is None:
            return source
        try:
            commit = find_dataset(source, offline=offline).commit
        except ParetronError as error:
            problems.extend(replace(p, where=f"{where}: {p.where}") for p in error.problems)
            return source
        return source.model_copy(update={"revision": commit})

    texts = {where: at_commit(where, text) for where, text in _texts(recipe).items()}
    data = recipe.data.model_copy(update={name: texts[f"data.{name}"] for name, _ in recipe.data})
    recipe = recipe.model_copy(update={"data": data})
    if (pretrain := recipe.teacher.pretrain) is not None:
        pretrain = pretrain.model_copy(update={"data": texts[_PRETRAIN]})
        teacher = recipe.teacher.model_copy(update={"pretrain": pretrain})
        recipe = recipe.model_copy(update={"teacher": teacher})
    return recipe, problems


def _texts(recipe: Recipe) -> dict[str, TokenisedSource]:
    """Every text of a recipe by its key."""
    texts: dict[str, TokenisedSource] = {f"data.{name}": text for name, text in recipe.data}
    if recipe.teacher.pretrain is not None:
        texts[_PRETRAIN] = recipe.teacher.pretrain.data
    return texts


def _parts(where: str, text: TokenisedSource) -> list[tuple[str, TextSource]]:
    """The sources of a text by their keys."""
    if not text.sources:
        return [(where, text)]
    return [(f"{where}.sources.{k}", source) for k, source in enumerate(text.sources)]


def _file_problems(where: str, source: TextSource) -> list[Problem]:
    """No file, a file of another kind, or only empty ones; found from names and sizes alone."""
    if source.dataset is not None:  # looked for when it was pinned
        return []
    try:
        files = source_files(source)
    except ParetronError as error:
        return [replace(p, where=f"{where}.path: {p.where}") for p in error.problems]
    if any(p.stat().st_size for p in files):
        return []
    return [
        Problem(
            Code.INPUT_CORPUS,
            "the text is empty",
            where=f"{where}.path: {source.path}",
            fix="name files that hold some",
        )
    ]
