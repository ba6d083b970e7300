"""How many steps a training takes, and the learning rate of each: pure functions of the step."""

from __future__ import annotations

import math

from paretron.errors import Code, ParetronError, Problem
from paretron.recipe import Training


def num_steps(settings: Training, *, seq_len: int) -> int:
    """Whole steps within the budget of tokens; RECIPE_VALUE when it holds not even one."""
    tokens_per_step = settings.global_batch * seq_len
    steps = settings.tokens // tokens_per_step
    if steps == 0:
        raise ParetronError(
            Problem(
                Code.RECIPE_VALUE,
                f"{settings.tokens} tokens are less than one step of {tokens_per_step}",
                where="tokens",
                fix="more tokens, or a smaller global_batch",
            )
        )
    return steps


def learning_rate(step: int, *, steps: int, peak: float, floor: float, warmup_steps: int) -> float:
    """Linear warm-up to `peak`, then half a cosine down to `floor` at the last step.

    `step` counts from 0. The first step already moves, the last one learns at the floor; a
    warm-up longer than the training simply never ends. Paper 2, section 3 (hyperparameters).
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    last = steps - 1
    done = (step - warmup_steps) / (last - warmup_steps) if last > warmup_steps else 1.0
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))
