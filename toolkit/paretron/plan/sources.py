"""A recipe's inputs as planning sees them: the teacher's config and headers, the texts' files."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paretron.artifacts.config import DTYPE_NAMES, read_config
from paretron.artifacts.hub import locate
from paretron.artifacts.reader import INDEX, SINGLE, Checkpoint
from paretron.errors import Code, ParetronError, Problem
from paretron.families import family_of, sizes
from paretron.recipe import Recipe, TextSource

TEXT_SUFFIXES = (".jsonl", ".txt")


@dataclass(frozen=True)
class FoundTeacher:
    """A teacher's config, where it lies, its safetensors dtype, and what is wrong with it."""

    config: dict[str, Any]
    folder: Path | None
    commit: str | None
    dtype: str
    problems: tuple[Problem, ...] = ()


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
    from_hub = located.commit is not None
    here = any((located.folder / name).is_file() for name in (INDEX, SINGLE))
    if here or not from_hub:  # a hub's weights come when the run starts
        try:
            dtype = Checkpoint.open(located.folder).dtype
        except ParetronError as error:
            problems += error.problems
        if not (located.folder / "tokenizer.json").is_file():
            problems.append(
                Problem(
                    Code.INPUT_TOKENIZER,
                    "no tokenizer.json here",
                    where=str(located.folder),
                    fix="copy the tokenizer files beside the weights",
                )
            )
    return FoundTeacher(config, located.folder, located.commit, dtype, tuple(problems))


def _pretrained(recipe: Recipe) -> FoundTeacher:
    pretrain = recipe.teacher.pretrain
    assert pretrain is not None
    config = pretrain.config | {"vocab_size": pretrain.tokenizer.vocab_size}
    try:
        sizes(family_of(config), config)
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
    training = {"distill": recipe.distill, "correct": recipe.correct}
    for name, section in training.items():
        if section is None:
            continue
        step = section.global_batch * recipe.data.train.seq_len
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
    if source.path is None:
        return []
    files = [Path(p) for p in sorted(glob.glob(source.path, recursive=True))]
    files = [p for p in files if p.is_file()]
    if not files:
        cause, at = "no file matches", source.path
    elif wrong := [p for p in files if p.suffix not in TEXT_SUFFIXES]:
        cause, at = f"not one of {', '.join(TEXT_SUFFIXES)}", str(wrong[0])
    elif not sum(p.stat().st_size for p in files):
        cause, at = "the text is empty", source.path
    else:
        return []
    return [
        Problem(
            Code.INPUT_CORPUS,
            cause,
            where=f"{where}.path: {at}",
            fix='.jsonl with {"text": ...} a line, or .txt',
        )
    ]
