"""What correcting the teacher needs: the library of adapters, weights that train, their cost."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from math import prod
from typing import Any

from paretron.errors import Problem
from paretron.families import Family, parameter_counts
from paretron.families.costs import ADAM_BYTES_PER_PARAM, CHECKPOINT_BYTES_PER_PARAM
from paretron.families.parts import layer_linears, norm_parameters
from paretron.plan.cost import ModelFacts
from paretron.recipe import Correct, Recipe
from paretron.recipe.limits import peft_missing
from paretron.recipe.training import Lora, Phase

_FROZEN_BYTES = 4  # of a weight that does not train: in fp32, without gradient or moments


def correction_problems(recipe: Recipe) -> list[Problem]:
    """OPTIONAL_MISSING where adapters are asked for and cannot be made here."""
    asked = recipe.correct is not None and recipe.correct.what == "lora"
    return [peft_missing()] if asked and find_spec("peft") is None else []


def trained_weights(correct: Correct | None, family: Family, config: Mapping[str, Any]) -> int:
    """How many numbers a correction trains; none where there is no correction."""
    if correct is None:
        return 0
    if correct.what == "norms":
        return sum(map(prod, norm_parameters(family, config).values()))
    if correct.what == "lora":
        rank = (correct.lora or Lora()).rank
        return sum(rank * sum(shape) for shape in layer_linears(family, config).values())
    return parameter_counts(family, config).total


def corrected_tokens(recipe: Recipe) -> list[tuple[int, int]]:
    """How many tokens a correction sees in windows of which length."""
    if recipe.correct is None:
        return []
    phases = recipe.distill.phases if recipe.correct.mode == "parallel" else ()
    seen, left = [], recipe.correct.tokens
    for phase in phases or (Phase(seq_len=recipe.data.train.seq_len, tokens=left),):
        seen.append((min(phase.tokens, left), phase.seq_len))
        left -= seen[-1][0]
    return seen


def correction_cost(
    recipe: Recipe, teacher: ModelFacts, *, trained: int, kept: int
) -> tuple[int, int, int]:
    """FLOPs, bytes of memory and of disk; `kept` checkpoints stay beside the result.

    In mode parallel, what each distillation needs besides its own: it asks the teacher anyway, so
    the FLOPs are those of the backward pass.
    """
    correct = recipe.correct
    if correct is None:
        return 0, 0, 0
    passes = correct.passes - (correct.mode == "parallel")
    seen = corrected_tokens(recipe)
    flops = passes * sum(teacher.forward_flops(tokens=n, seq_len=length) for n, length in seen)
    frozen = teacher.params if correct.what == "lora" else teacher.params - trained
    memory = ADAM_BYTES_PER_PARAM * trained + _FROZEN_BYTES * frozen
    return flops, memory, kept * CHECKPOINT_BYTES_PER_PARAM * trained + teacher.weight_bytes
