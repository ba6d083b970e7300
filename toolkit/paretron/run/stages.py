"""What does each kind of stage: every function reads its inputs and publishes one artifact."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paretron.artifacts.copying import link_or_copy
from paretron.artifacts.journal import Journal
from paretron.artifacts.staging import staged
from paretron.data.texts import Texts
from paretron.families import sizes
from paretron.plan.shapes import student_sizes
from paretron.plan.stages import captured_seq_len
from paretron.plugins import EXPORTERS, find_plugin
from paretron.recipe import Correct, Distill, Evaluate
from paretron.run.runner import Context, StageFunction


def teacher(context: Context) -> None:
    """A teacher trained from scratch, kept in the user's cache for the next run."""
    from paretron.run.pretrain import pretrained_teacher

    pretrained_teacher(context)


def data(context: Context) -> None:
    """The recipe's three texts as tokens, by the teacher's tokenizer; made in the stage's state.

    There a run that was killed goes on with them.
    """
    from paretron.run.texts import build_store

    with staged(context.out, provenance=context.provenance, overwrite=context.overwrite) as folder:
        for name, source in context.recipe.data:
            context.on_event("note", {"message": f"tokenising {name}"})
            begun = context.state / name
            depends_on = {"stage": context.provenance.stage, "text": name}
            build_store(
                source,
                begun,
                tokenizer=context.folders["tokenizer"],
                max_tokens=context.stage.settings["tokens"][name],
                offline=context.offline,
                journal=Journal(context.state / f"{name}.jsonl", of=depends_on, start_over=True),
            )
            # What is published stays in the state, should the rename not come.
            shutil.copytree(begun, folder / name, copy_function=link_or_copy)


def correct(context: Context) -> None:
    """Teacher correction: the distillation loop with plain language-model loss."""
    section = context.recipe.correct
    if section is None:
        raise ValueError("a correct stage without a correct section")
    _train(context, section.model_copy(update={"trial": None}), teacher=None)


def distill(context: Context) -> None:
    """A student trained against its teacher's logits."""
    recipe = context.recipe
    _train(
        context,
        recipe.distill,
        teacher=context.folders["teacher"],
        correct=recipe.parallel_correction,
    )


def _train(
    context: Context,
    section: Correct | Distill,
    *,
    teacher: Path | None,
    correct: Correct | None = None,
) -> None:
    from paretron.distill.stage import train

    texts = context.recipe.data
    train(
        context.folders["student"],
        context.folders["data"] / "train",
        teacher=teacher,
        settings=section,
        seq_len=texts.train.seq_len,
        validation_tokens=context.folders["data"] / "validation",
        validation_seq_len=texts.validation.seq_len,
        seed=context.recipe.seed,
        out=context.out,
        state=context.state,
        provenance=context.provenance,
        overwrite=context.overwrite,
        apart=texts.train.documents == "apart",
        correct=correct,
        on_event=context.on_event,
    )


def trial(context: Context) -> None:
    """A student's short distillation, of which the loss alone is kept."""
    from paretron.run.trial import try_teacher

    try_teacher(context)


def decide(context: Context) -> None:
    """The teacher that goes on: the corrected one where it was seen to teach better."""
    from paretron.run.trial import decide_teacher

    decide_teacher(context)


def capture(context: Context) -> None:
    """What the teacher says of the whole training text, for all students."""
    from paretron.distill.capture.stage import capture as capture_teacher

    section = context.recipe.distill
    if section.offline is None:
        raise ValueError("a capture stage without distill.offline")
    capture_teacher(
        context.folders["teacher"],
        context.folders["data"] / "train",
        kind=section.offline,
        settings=section,
        seq_len=captured_seq_len(context.recipe),
        apart=context.recipe.data.train.documents == "apart",
        out=context.out,
        state=context.state,
        provenance=context.provenance,
        overwrite=context.overwrite,
        on_event=context.on_event,
    )


def score(context: Context) -> None:
    """Importance of every axis, and what removing layers costs."""
    from paretron.importance.stage import score_model

    score_model(
        context.folders["model"],
        context.folders["data"] / "calibration",
        score=context.recipe.score,
        calibration_settings=context.recipe.data.calibration,
        block_sizes=tuple(context.stage.settings["block_sizes"]),
        seed=context.recipe.seed,
        out=context.out,
        state=context.state,
        provenance=context.provenance,
        overwrite=context.overwrite,
        on_event=context.on_event,
    )


def prune(context: Context) -> None:
    """One student's shape cut out of the teacher: as stated, or as its search chose."""
    from paretron.artifacts.config import family_and_config
    from paretron.run.pruning import prune_to

    if "search" in context.folders:
        from paretron.search.stage import chosen_sizes

        wanted = chosen_sizes(context.folders["search"])
    else:
        family, config = family_and_config(context.folders["model"])
        target = context.recipe.students[str(context.stage.student)]
        wanted = student_sizes(sizes(family, config), target)
    prune_to(
        context,
        wanted,
        out=context.out,
        provenance=context.provenance,
        overwrite=context.overwrite,
    )


def shapes(context: Context) -> None:
    """The shapes that a student's search will look at, timed where the budget is one of speed."""
    from paretron.artifacts.config import DTYPE_NAMES
    from paretron.artifacts.reader import Checkpoint
    from paretron.plan.searching import servable
    from paretron.run.searching import search_of
    from paretron.search.stage import find_candidates

    teacher = Checkpoint.open(context.folders["model"])
    find_candidates(
        teacher.config,
        family=teacher.family,
        dtype=context.recipe.prune.dtype or DTYPE_NAMES[teacher.dtype],
        search=search_of(context),
        servable=servable(context.recipe, teacher.config),
        where=f"students.{context.stage.student}.search",
        out=context.out,
        provenance=context.provenance,
        overwrite=context.overwrite,
        on_event=context.on_event,
    )


def search(context: Context) -> None:
    """The best of a student's shapes: ranked without training, then by short distillation."""
    from paretron.run.searching import search_of, trained_losses
    from paretron.search.stage import Ranked, search_student

    text = context.recipe.data.validation
    search_student(
        Ranked(
            model=context.folders["model"],
            scores=context.folders["scores"],
            tokens=context.folders["data"] / "validation",
            seq_len=text.seq_len,
            seed=context.recipe.seed,
            calibration=context.folders["data"] / "calibration",
            calibration_settings=context.recipe.data.calibration,
        ),
        context.folders["shapes"],
        search=search_of(context),
        prune=context.recipe.prune,
        score=context.recipe.score,
        compensate=context.recipe.compensate,
        trained_loss=lambda found: trained_losses(context, found),
        state=context.state,
        out=context.out,
        provenance=context.provenance,
        overwrite=context.overwrite,
        on_event=context.on_event,
    )


def evaluate(context: Context) -> None:
    """Loss and perplexity on the held-out texts that the recipe names, and its tasks."""
    from paretron.evaluate.stage import evaluate_model

    texts = dict(context.recipe.data)
    settings = Evaluate.model_validate(context.stage.settings["evaluate"])
    evaluate_model(
        context.folders["model"] / context.stage.settings.get("folder", ""),
        {
            name: (context.folders["data"] / name, texts[name].seq_len)
            for name in settings.perplexity
        },
        settings=settings,
        out=context.out,
        provenance=context.provenance,
        state=context.state,
        offline=context.offline,
        overwrite=context.overwrite,
        on_event=context.on_event,
    )


def export(context: Context) -> None:
    """One export, published only when its gates pass."""
    wanted: Mapping[str, Any] = context.stage.settings["export"]
    settings = next(e for e in context.recipe.export if e.model_dump(mode="json") == wanted)
    tokens = context.folders.get("data")
    find_plugin(EXPORTERS, settings.to, where="export").export(
        context.folders["model"],
        export=settings,
        texts=tokens and Texts.of(context.recipe, tokens),
        out=context.out,
        provenance=context.provenance,
        overwrite=context.overwrite,
        on_event=context.on_event,
    )


def profile(context: Context) -> None:
    """Measured speed of teacher and students on every engine."""
    from paretron.run.measure import profile_run

    profile_run(context)


def report(context: Context) -> None:
    """What the run made and measured, as report.json and report.html."""
    from paretron.run.reporting import write_report

    write_report(context)


STAGES: Mapping[str, StageFunction] = {
    "teacher": teacher,
    "data": data,
    "correct": correct,
    "trial": trial,
    "decide": decide,
    "capture": capture,
    "score": score,
    "shapes": shapes,
    "search": search,
    "prune": prune,
    "distill": distill,
    "evaluate": evaluate,
    "export": export,
    "profile": profile,
    "report": report,
}
