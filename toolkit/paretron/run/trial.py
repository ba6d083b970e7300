"""The trial of a correction: one student learns from either teacher, the better one goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from paretron.artifacts.copying import copy_checkpoint
from paretron.artifacts.jsonfile import dump, read_object
from paretron.artifacts.manifest import MANIFEST
from paretron.artifacts.staging import staged
from paretron.errors import Code, ParetronError
from paretron.plan.trial import trial_distill
from paretron.run.runner import Context
from paretron.run.searching import final_loss

TRIAL, DECISION = "trial.json", "decision.json"
_SPOILT = frozenset({Code.GATE_PREFLIGHT, Code.GATE_NONFINITE})


def try_teacher(context: Context) -> None:
    """Distil the stage's student from the stage's teacher and publish its validation loss.

    From a corrected teacher that nothing can be learned from it is null: that is an answer too. The
    trial of the teacher as it is comes first, so it is not the student's or the text's fault.
    """
    result: dict[str, Any] = {"schema": 1, "tokens": trial_distill(context.recipe).tokens}
    try:
        result |= {"loss": _trained_loss(context), "problems": []}
    except ParetronError as error:
        codes = {problem.code for problem in error.problems}
        if context.stage.inputs["teacher"] != "correct" or not codes <= _SPOILT:
            raise
        result |= {"loss": None, "problems": [p.as_json() for p in error.problems]}
    with staged(context.out, provenance=context.provenance, overwrite=context.overwrite) as folder:
        dump(folder / TRIAL, result)


def _trained_loss(context: Context) -> float:
    from paretron.distill.stage import train

    trained = context.state / "trained"
    if not (trained / MANIFEST).is_file():
        texts = context.recipe.data
        train(
            context.folders["student"],
            context.folders["data"] / "train",
            teacher=context.folders["teacher"],
            settings=trial_distill(context.recipe),
            seq_len=texts.train.seq_len,
            validation_tokens=context.folders["data"] / "validation",
            validation_seq_len=texts.validation.seq_len,
            seed=context.recipe.seed,
            out=trained,
            state=context.state / "state",
            provenance=replace(context.provenance, kind="distill", stage={}),
            apart=texts.train.documents == "apart",
            on_event=context.on_event,
        )
    return final_loss(trained)


def decide_teacher(context: Context) -> None:
    """Publish a copy of the teacher that goes on, with decision.json.

    The corrected one goes on where the student's loss was lower with it.
    """
    found = {
        which: read_object(context.folders[which] / TRIAL, code=Code.INPUT_MANIFEST)
        for which in ("without", "with")
    }
    before, after = (found[which]["loss"] for which in ("without", "with"))
    decision = {
        "schema": 1,
        "goes_on": "corrected" if after is not None and after < before else "uncorrected",
        "student": context.stage.student,
        "tokens": found["with"]["tokens"],
        "loss_without": before,
        "loss_with": after,
        "difference": None if after is None else after - before,
        "problems": found["with"]["problems"],
    }
    with staged(context.out, provenance=context.provenance, overwrite=context.overwrite) as folder:
        copy_checkpoint(context.folders[str(decision["goes_on"])], folder)
        dump(folder / DECISION, decision)
    context.on_event("note", {"message": decided(decision)})


def decision_of(teacher: Path) -> dict[str, Any] | None:
    """What was decided of the teacher in this folder, if anything."""
    path = teacher / DECISION
    return read_object(path, code=Code.INPUT_MANIFEST) if path.is_file() else None


def decided(decision: Mapping[str, Any]) -> str:
    """A decision in one sentence."""
    after, before = decision["loss_with"], decision["loss_without"]
    learned = (
        f"learned to a validation loss of {before:.4f} from the teacher as it was and "
        + (f"of {after:.4f} from the corrected one" if after is not None else
           "nothing from the corrected one")
    )  # fmt: skip
    return (
        f"Trial of the correction: on {decision['tokens']:,} tokens {decision['student']} "
        f"{learned}; the {decision['goes_on']} teacher went on."
    )
