"""Who answers a task's questions, and what comes of the answers once lm-eval has judged them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from paretron.errors import Code, ParetronError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = Sequence[int]
# lm-eval's own seed for drawing examples and answers, so that its figures can be compared.
SEED = 1234


class Asker(Protocol):
    """A model that answers: by likelihoods of given texts, and by writing on."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """What cuts the questions into tokens."""

    @property
    def max_length(self) -> int:
        """The most tokens that it reads at once."""

    def log_likelihoods(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[tuple[float, bool]]:
        """The log-likelihood in nats of each pair's second after its first; is it the likeliest.

        What is longer than `max_length` loses tokens at its start.
        """

    def generate(
        self,
        prompts: Sequence[Tokens],
        *,
        max_tokens: int,
        until: Sequence[str],
        temperature: float,
        top_p: float,
    ) -> list[str]:
        """A text after each prompt, drawn, or greedy at temperature 0; cut before `until`."""


@dataclass(frozen=True)
class Judged:
    """What came of one task.

    `scores` holds a number for each document where `value` is their mean, else nothing.
    """

    metric: str
    value: float
    stderr: float | None
    scores: tuple[float, ...]
    samples: int
    few_shot: int
    higher_is_better: bool


def judged(name: str, found: Mapping[str, Any], *, metric: str | None, where: str) -> Judged:
    """A task's figures out of lm-eval's result; `metric` is the first one when left out.

    Errors: RECIPE_VALUE for a metric that it has not, GATE_NONFINITE.
    """
    figures = {
        key: value
        for key, value in found["results"][name].items()
        if "," in key and "_stderr," not in key
    }
    key = _chosen(figures, metric, where)
    bare, _, filtered = key.partition(",")
    value, stderr = figures[key], found["results"][name].get(f"{bare}_stderr,{filtered}")
    if not (isinstance(value, int | float) and math.isfinite(value)):
        cause = f"{key} is {value}"
        fix = "use a checkpoint whose training did not diverge, or another metric"
        raise ParetronError(Problem(Code.GATE_NONFINITE, cause, where=where, fix=fix))
    samples = [s for s in found["samples"][name] if s["filter"] == filtered]
    samples.sort(key=lambda s: s["doc_id"])
    better = found["higher_is_better"][name]
    return Judged(
        metric=bare if filtered == "none" else key,
        value=float(value),
        stderr=float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None,
        scores=_scores([s.get(bare) for s in samples], float(value)),
        samples=len(samples),
        few_shot=int(found["n-shot"][name] or 0),
        # A metric that returns several figures is stated under its own name alone.
        higher_is_better=bool(better.get(bare, all(better.values()))),
    )


def _chosen(figures: Mapping[str, Any], metric: str | None, where: str) -> str:
    """The key of a metric as lm-eval spells it, `acc,none`; the first without one asked for."""
    for key in figures:
        if metric in (None, key, key.partition(",")[0]):
            return key
    known = ", ".join(key.removesuffix(",none") for key in figures)
    cause = f"it has no metric {metric!r}"
    raise ParetronError(Problem(Code.RECIPE_VALUE, cause, where=where, fix=f"one of {known}"))


def _scores(values: Sequence[Any], mean: float) -> tuple[float, ...]:
    """The documents' own figures, if the task's is their mean."""
    if not values or not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
        return ()
    numbers = tuple(float(v) for v in values)
    return numbers if math.isclose(sum(numbers) / len(numbers), mean, abs_tol=1e-9) else ()
