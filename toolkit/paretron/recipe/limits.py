"""What part of a recipe cannot be had, said alike when planning and when running."""

from __future__ import annotations

from paretron.errors import Code, Problem
from paretron.recipe.models import Profile
from paretron.recipe.training import Loss, States


def batch_problems(profile: Profile, *, engine: str, largest_batch: int | None) -> list[Problem]:
    """The recipe's batches above an engine's largest; none where only memory limits it."""
    return [
        Problem(
            Code.RECIPE_VALUE,
            f"{engine} takes batches of at most {largest_batch}, not {batch}",
            where="profile.batches",
            fix=f"at most {largest_batch}",
        )
        for batch in profile.batches
        if largest_batch is not None and batch > largest_batch
    ]


def loss_problems(
    loss: Loss, *, vocab: int, teacher_layers: int, layers: int, apart: bool
) -> list[Problem]:
    """A `top_k` that leaves no token over, and `states` of layers that teacher or student lack.

    With documents `apart`, also relations between the positions of a whole window.
    """
    problems = []
    if loss.top_k is not None and loss.top_k >= vocab:
        cause = f"{loss.top_k} of a vocabulary of {vocab} tokens"
        problems.append(_value("top_k", cause, f"at most {vocab - 1}, or leave it out"))
    states = loss.states or States()
    if apart and states.attention:
        cause = "they relate every position of a window to every other, of all its documents"
        problems.append(_value("states.attention", cause, "data.train.documents: joined"))
    for kind in ("output", "mlp_input", "attention"):
        for teacher, student in getattr(states, kind):
            if teacher >= teacher_layers or student >= layers:
                cause = f"[{teacher}, {student}] of {teacher_layers} and {layers} layers"
                fix = f"at most [{teacher_layers - 1}, {layers - 1}]: layers count from 0"
                problems.append(_value(f"states.{kind}", cause, fix))
    return problems


def peft_missing() -> Problem:
    """What is said where adapters are asked for and the library that makes them is absent."""
    return Problem(
        Code.OPTIONAL_MISSING,
        "LoRA adapters need peft, which is not installed",
        where="correct.what",
        fix='pip install "paretron[lora]"',
    )


def _value(key: str, cause: str, fix: str) -> Problem:
    return Problem(Code.RECIPE_VALUE, cause, where=f"distill.loss.{key}", fix=fix)
