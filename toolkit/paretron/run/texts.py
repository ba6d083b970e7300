"""A recipe's texts: their identity for fingerprints, and their tokens on disk."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from paretron.artifacts.journal import Journal
from paretron.artifacts.manifest import sha256_file
from paretron.data.mixing import Mixture, Share
from paretron.data.sources import content_sha256, read_documents, source_files
from paretron.data.taskfiles import lm_eval_version, task_files, task_sha256
from paretron.plan.stages import Stage
from paretron.recipe import Evaluate, Recipe, Task, TextSource, TokenisedSource
from paretron.run.workspace import Workspace


def content_identity(stage: Stage, recipe: Recipe, workspace: Workspace) -> str | None:
    """One hash over what a stage reads itself from outside; None for a stage that reads nothing."""
    if stage.kind == "data":
        texts: list[TokenisedSource] = [text for _, text in recipe.data]
    elif stage.kind == "shapes":
        return _table_identity(stage, recipe, workspace)
    elif stage.kind == "score":
        return _task_identity(recipe.score.depth.task_file, workspace)
    elif stage.kind == "evaluate":
        asked = Evaluate.model_validate(stage.settings["evaluate"]).asked
        return _tasks_identity(asked, workspace)
    elif stage.kind == "teacher" and recipe.teacher.pretrain is not None:
        texts = [recipe.teacher.pretrain.data]
    else:
        return None
    sources = (source for text in texts for source in text.parts)
    return "+".join(_identity(source, workspace)[:16] for source in sources)


def _table_identity(stage: Stage, recipe: Recipe, workspace: Workspace) -> str | None:
    """The hash of the operator table that a search's budget names."""
    search = recipe.students[str(stage.student)].search
    speed = search.budget.speed if search is not None else None
    if speed is None or speed.table is None:
        return None
    path = Path(speed.table)
    return workspace.remembered(str(path), [path], lambda: sha256_file(path))


def _task_identity(path: Path | None, workspace: Workspace) -> str | None:
    """The hash of a task's file and of the documents that it names; None for a name."""
    if path is None or not path.is_file():  # loading the task says what is wrong
        return None
    return workspace.remembered(str(path), task_files(path), lambda: task_sha256(path))


def _tasks_identity(tasks: Sequence[Task], workspace: Workspace) -> str | None:
    """What decides on the tasks of an evaluation: their files, and the version that judges them."""
    if not tasks:
        return None
    files = (_task_identity(task.file, workspace) for task in tasks)
    return "+".join([f"lm-eval {lm_eval_version()}", *(f[:16] for f in files if f)])


def _identity(source: TextSource, workspace: Workspace) -> str:
    if source.dataset is not None:  # planning put a commit in the place of its revision
        return str(source.revision)
    name = source.path or f"{source.corpus} {source.part}"
    return workspace.remembered(name, source_files(source), lambda: content_sha256(source))


def build_store(
    text: TokenisedSource,
    folder: Path,
    *,
    tokenizer: Path,
    max_tokens: int | None,
    offline: bool,
    journal: Journal | None = None,
) -> None:
    """Tokenise a text into a store at `folder`, documents separated by the end-of-text token.

    With a `journal` of this text it goes on where it was stopped.
    """
    from paretron.artifacts.models import load_tokenizer
    from paretron.data.tokens import build_token_store
    from paretron.errors import Code, ParetronError, Problem

    loaded = load_tokenizer(tokenizer)
    if loaded.eos_token_id is None:
        raise ParetronError(
            Problem(
                Code.INPUT_TOKENIZER,
                "the tokenizer has no end-of-text token to separate documents",
                where=str(tokenizer / "tokenizer_config.json"),
                fix="set eos_token",
            )
        )
    build_token_store(
        _mixture(text, offline=offline) if text.sources else read_documents(text, offline=offline),
        loaded,
        folder,
        eos_token_id=loaded.eos_token_id,
        max_tokens=max_tokens,
        journal=journal,
    )


def _mixture(text: TokenisedSource, *, offline: bool) -> Mixture:
    assert text.tokens is not None  # by the recipe's own check
    shares = tuple(
        Share(
            name=str(source.path or source.dataset or f"{source.corpus} {source.part}"),
            weight=source.weight,
            documents=partial(read_documents, source, offline=offline),
            repeat=source.repeat,
        )
        for source in text.sources
    )
    return Mixture(shares, text.tokens)
