"""Short distillations, from which searches and the trial of a correction learn."""

from __future__ import annotations

from paretron.recipe import Distill, Recipe

WARMUP_SHARE = 10  # of a short training, at most one step in ten warms up


def shortened(distill: Distill, tokens: int, *, seq_len: int) -> Distill:
    """A distillation on fewer tokens, with its teacher beside it: a schedule of its own, measured
    at its ends."""
    steps = max(1, tokens // (distill.global_batch * seq_len))
    return distill.model_copy(
        update={
            "tokens": tokens,
            "phases": (),
            "warmup_steps": min(distill.warmup_steps, steps // WARMUP_SHARE),
            "eval_every": steps,
            "offline": None,
        }
    )


def trial_student(recipe: Recipe) -> str | None:
    """Whose shape the trial of a correction distils; None where there is no trial."""
    if recipe.correct is None or recipe.correct.trial is None:
        return None
    stated = (name for name, student in recipe.students.items() if student.search is None)
    return recipe.correct.trial.student or next(stated)


def trial_distill(recipe: Recipe) -> Distill:
    """How that student is distilled, from either teacher."""
    if recipe.correct is None or recipe.correct.trial is None:
        raise ValueError("no correction, or one without a trial")
    tokens = recipe.correct.trial.tokens
    return shortened(recipe.distill, tokens, seq_len=recipe.data.train.seq_len)
