"""Successive halving: all that are left train alike, the better half goes on with more tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from paretron.artifacts.journal import Figures, Journal
from paretron.errors import Code, ParetronError, Problem
from paretron.search.frontier import Point, best, better_half

# (candidate's key, number of the round, tokens) -> loss afterwards; an error is a failed figure.
TrainedLoss = Callable[[str, int, int], float]


@dataclass(frozen=True)
class Halved:
    """The winner, and the loss of every candidate after each round that it took part in."""

    winner: Point
    rounds: Mapping[str, tuple[float | None, ...]]


def halve(
    contenders: Sequence[Point],
    rounds: Sequence[int],
    *,
    trained_loss: TrainedLoss,
    journal: Journal,
) -> Halved:
    """Run the rounds and name the winner: the lowest loss after the last one.

    Every round starts from the pruned weights, so that its losses end one schedule each. A
    candidate whose training diverges is out. GATE_NONFINITE when none is left. Rounds that a
    single candidate would run alone are left out.
    """
    losses: dict[str, tuple[float | None, ...]] = {p.key: () for p in contenders}
    left = list(contenders)
    for number, tokens in enumerate(rounds):
        if len(left) < 2:
            break
        ran = []
        for point in sorted(left, key=lambda p: p.key):
            figures = journal.known.get(("round", number, point.key))
            if figures is None:
                found = _figures(trained_loss, point.key, number, tokens)
                figures = journal.add(("round", number, point.key), found)
            losses[point.key] += (figures["loss"],)
            ran.append(replace(point, loss=figures["loss"]))
        left = better_half(ran)
    winner = best(left)
    if winner is None:
        raise ParetronError(
            Problem(
                Code.GATE_NONFINITE,
                "no candidate has a finite loss",
                where="search",
                fix="a lower distill.lr, or other text",
            )
        )
    return Halved(winner, losses)


def _figures(trained_loss: TrainedLoss, key: str, number: int, tokens: int) -> Figures:
    """The loss, or why there is none; only a training that diverges is a figure that failed."""
    try:
        loss = trained_loss(key, number, tokens)
    except ParetronError as error:
        if error.problems[0].code is not Code.GATE_NONFINITE:
            raise
        return {"loss": None, "failed": error.problems[0].cause}
    return finite(loss)


def finite(loss: float) -> Figures:
    """A loss as figures that JSON can hold."""
    if math.isfinite(loss):
        return {"loss": loss}
    return {"loss": None, "failed": f"the loss is {loss}"}
