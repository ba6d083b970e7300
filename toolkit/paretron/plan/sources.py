"""A recipe's inputs as planning sees them: the teacher's config and headers, the texts' files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paretron.artifacts.config import DTYPE_NAMES, read_config
from paretron.artifacts.hub import locate
from paretron.artifacts.reader import INDEX, SINGLE, Checkpoint
from paretron.artifacts.tokenizer import tokenizer_problems
from paretron.data.sources import source_files
from paretron.errors import Code, ParetronError, Problem
from paretron.families import explicit, family_of
from paretron.recipe import Recipe, TextSource


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
    sources: dict[str, TextSource] = {f"data.{name}": source for name, source in recipe.data}
    if recipe.teacher.pretrain is not None:
        sources["teacher.pretrain.data"] = recipe.teacher.pretrain.data
    problems: list[Problem] = []
    longest = config.get("max_position_embeddings")
    for where, source in sources.items():
        problems += _file_problems(where, source)
        seq_len = getattr(source, "seq_len", 0)
        if isinstance(longest, int) and seq_len > longest:
            problems.append(
                Problem(
                    Code.RECIPE_VALUE,
                    f"{seq_len} is longer than the teacher's context of {longest}",
                    where=f"{where}.seq_len",
                    fix=f"at most {longest}",
                )
            )
    pretrain = recipe.teacher.pretrain
    training = [
        ("distill", recipe.distill, recipe.data.train.seq_len),
        ("correct", recipe.correct, recipe.data.train.seq_len),
        ("teacher.pretrain", pretrain, pretrain.data.seq_len if pretrain else 0),
    ]
    for name, section, seq_len in training:
        if section is None:
            continue
        step = section.global_batch * seq_len
        if section.tokens < step:
            problems.append(
                Problem(
                    Code.RECIPE_VALUE,
                    f"{section.tokens} tokens are less than one step of {step}",
                    where=f"{name}.tokens",
                    fix="more tokens, or a smaller global_batch",
                )
            )
    return problems


def _file_problems(where: str, source: TextSource) -> list[Problem]:
    """No file, a file of another kind, or only empty ones; found from names and sizes alone."""
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
