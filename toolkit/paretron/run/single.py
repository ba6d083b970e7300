"""One stage alone, for the verbs that work on folders instead of a whole run."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from paretron.artifacts.manifest import Provenance
from paretron.artifacts.staging import refuse_existing, refuse_overlap
from paretron.data.texts import Texts
from paretron.plan.stages import captured_seq_len
from paretron.recipe import Correct, Engine, Evaluate, Recipe, TokenisedSource, Training
from paretron.run.events import OnEvent
from paretron.run.memory import input_identity
from paretron.run.signals import interruptible
from paretron.run.texts import build_store
from paretron.workers.launch import process_rank


def provenance_of(
    kind: str,
    parents: Mapping[str, Path],
    settings: Mapping[str, BaseModel],
    *,
    seed: int | None = None,
) -> Provenance:
    """The provenance of an artifact made by one verb."""
    found = {role: input_identity(folder) for role, folder in parents.items()}
    return Provenance(
        kind=kind,
        parents={role: known.sha256 for role, known in found.items()},
        unverified=tuple(role for role, known in found.items() if not known.verified),
        settings={name: section.model_dump(mode="json") for name, section in settings.items()},
        seed=seed,
    )


# Of a question with its examples, where an engine is told how much to serve: lm-eval's own bound is
# 2048, and few tasks reach beyond this.
_TASK_TOKENS = 4096


@contextmanager
def text_store(
    source: TokenisedSource, *, tokenizer: Path, offline: bool, at_most: int | None = None
) -> Iterator[Path]:
    """A recipe's text as tokens, in a temporary folder; `at_most` where it states no bound."""
    with tempfile.TemporaryDirectory(prefix="paretron-") as folder:
        store = Path(folder) / "tokens"
        limit = source.tokens or at_most
        build_store(source, store, tokenizer=tokenizer, max_tokens=limit, offline=offline)
        yield store


@contextmanager
def export_texts(recipe: Recipe, *, tokenizer: Path, offline: bool) -> Iterator[Texts]:
    """The texts that a quantised export is calibrated on and judged by, in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="paretron-") as folder:
        for name, source in (
            ("calibration", recipe.data.calibration),
            ("validation", recipe.data.validation),
        ):
            build_store(
                source,
                Path(folder) / name,
                tokenizer=tokenizer,
                max_tokens=source.tokens,
                offline=offline,
            )
        yield Texts.of(recipe, Path(folder))


def is_captured(folder: Path) -> bool:
    """Whether a folder holds what a teacher said, not a teacher."""
    from paretron.distill.capture.cache import is_capture

    return is_capture(folder)


def capture_alone(
    teacher: Path, recipe: Recipe, *, out: Path, overwrite: bool, offline: bool, on_event: OnEvent
) -> None:
    """Keep what a teacher says of a recipe's text; its state lies beside `out` until it is done."""
    import shutil

    from paretron.distill.capture.stage import capture

    refuse_overlap(out, teacher)
    refuse_existing(out, overwrite=overwrite)
    text, settings = recipe.data.train, recipe.distill
    state = out.parent / f".{out.name}.state"
    with (
        interruptible(),
        text_store(text, tokenizer=teacher, offline=offline, at_most=settings.tokens) as tokens,
    ):
        capture(
            teacher,
            tokens,
            kind=settings.offline or "top_k",
            settings=settings,
            seq_len=captured_seq_len(recipe),
            apart=text.documents == "apart",
            out=out,
            state=state,
            provenance=provenance_of("capture", {"teacher": teacher}, {"distill": settings}),
            overwrite=overwrite,
            on_event=on_event,
        )
    if process_rank() == 0:
        shutil.rmtree(state, ignore_errors=True)


def evaluate_alone(
    model: Path,
    texts: Mapping[str, TokenisedSource],
    *,
    settings: Evaluate,
    server: str | None = None,
    served_name: str | None = None,
    engine: Engine | None = None,
    out: Path,
    overwrite: bool,
    offline: bool,
    on_event: OnEvent,
) -> None:
    """Measure a checkpoint, or what a server answers to its tokens: one that runs already, or one
    of an `engine`, which then serves it.

    The state of its tasks lies beside `out` until it is done; none is kept of a server.
    """
    import shutil

    from paretron.evaluate.endpoint import connected
    from paretron.evaluate.stage import evaluate_model, evaluate_server
    from paretron_profiling.servers.serving import serving

    refuse_existing(out, overwrite=overwrite)
    role = "model" if server is None else "tokenizer"
    about: dict[str, str] | None = None
    common: dict[str, Any] = {
        "settings": settings,
        "out": out,
        "provenance": provenance_of("evaluate", {role: model}, {"evaluate": settings}),
        "offline": offline,
        "overwrite": overwrite,
        "on_event": on_event,
    }
    with ExitStack() as stack:
        if engine is not None:
            longest = max((texts[name].seq_len for name in settings.perplexity), default=0)
            tokens = max(longest, _TASK_TOKENS if settings.asked else 0) + 1
            server, served_name, about = stack.enter_context(
                serving(model, settings=engine, batch=settings.micro_batch, tokens=tokens)
            )
        endpoint = server and stack.enter_context(
            connected(server, model=served_name, offline=offline)
        )
        stores: dict[str, tuple[Path, int]] = {
            name: (
                stack.enter_context(text_store(texts[name], tokenizer=model, offline=offline)),
                texts[name].seq_len,
            )
            for name in settings.perplexity
        }
        if endpoint:
            evaluate_server(endpoint, stores, tokenizer=model, about=about, **common)
            return
        state = out.parent / f".{out.name}.state"
        evaluate_model(model, stores, state=state, **common)
        shutil.rmtree(state, ignore_errors=True)


def train_alone(
    kind: str,
    student: Path,
    teacher: Path | None,
    recipe: Recipe,
    settings: Training,
    *,
    out: Path,
    overwrite: bool,
    offline: bool,
    correct: Correct | None = None,
    on_event: OnEvent,
) -> None:
    """Correct or distil one checkpoint; its state lies beside `out` until it is done."""
    import shutil

    from paretron.distill.stage import train

    parents = {"student": student} | ({"teacher": teacher} if teacher else {})
    for folder in parents.values():
        refuse_overlap(out, folder)
    refuse_existing(out, overwrite=overwrite)
    texts = recipe.data
    sections: dict[str, BaseModel] = {kind: settings}
    if correct is not None:
        sections["correct"] = correct
    state = out.parent / f".{out.name}.state"
    with (
        interruptible(),
        text_store(
            texts.train, tokenizer=student, offline=offline, at_most=settings.tokens
        ) as tokens,
        text_store(texts.validation, tokenizer=student, offline=offline) as validation,
    ):
        train(
            student,
            tokens,
            teacher=teacher,
            settings=settings,
            seq_len=texts.train.seq_len,
            validation_tokens=validation,
            validation_seq_len=texts.validation.seq_len,
            seed=recipe.seed,
            out=out,
            state=state,
            provenance=provenance_of(kind, parents, sections, seed=recipe.seed),
            overwrite=overwrite,
            apart=texts.train.documents == "apart",
            correct=correct,
            on_event=on_event,
        )
    shutil.rmtree(state, ignore_errors=True)
