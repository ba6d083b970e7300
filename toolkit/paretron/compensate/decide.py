"""Which compensation a student gets, and what is said about it: from a config alone, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from paretron.compensate.residual import refit_limit, rotation_limit, unabsorbed
from paretron.errors import Code, Problem
from paretron.families import Family, Sizes
from paretron.recipe import Compensate


@dataclass(frozen=True)
class Decision:
    """What is done to one student; `extra_params` is what untying its head adds.

    `notes` say what applies and what it falls back to; `problems` what was asked for and cannot be.
    """

    rotate: bool = False
    untie: bool = False
    refit: bool = False
    means: bool = False  # refitted to means alone
    spread: bool = False
    extra_params: int = 0
    notes: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()

    @property
    def any(self) -> bool:
        """Whether the student is more than trimmed."""
        return self.rotate or self.refit

    def merges_heads(self, asked: bool | Literal["auto"]) -> bool:
        """Whether residuals of pruned heads go into kept ones, for `prune.merge_heads`."""
        # Merged heads were no help to heads that are refitted, and harm without (measured).
        return asked is True or (asked == "auto" and not self.refit)


def decide(
    family: Family, config: Mapping[str, Any], *, sizes: Sizes, new: Sizes, settings: Compensate
) -> Decision:
    """What `settings` come to for a model of these `sizes` cut to `new` ones.

    "auto" rotates where that is exact and changes no parameter count, and refits wherever the
    family allows it.
    """
    notes: list[str] = []
    problems: list[Problem] = []
    limit, tied = rotation_limit(family), bool(config.get("tie_word_embeddings", False))
    wanted = settings.rotate is True or (
        settings.rotate == "auto" and (new["hidden"] < sizes["hidden"] or settings.spread)
    )
    extra = sizes["vocab"] * new["hidden"] if tied else 0
    rotate = wanted and not limit and (settings.rotate is True or not tied)
    if wanted and limit and settings.rotate is True:
        problems.append(_problem("rotate", f"{family.model_type}: {limit}", "auto or false"))
    elif wanted and limit:
        notes.append(f"hidden by channel selection, not rotation: {limit}")
    elif wanted and not rotate:
        notes.append(
            "hidden by channel selection, not rotation: embedding and head are one matrix "
            f"(compensate.rotate: true gives the head its own, {extra} parameters more)"
        )
    if settings.spread and not rotate:
        problems.append(_problem("spread", "there is no rotation to spread with", "false"))
    if rotate:
        how = "its principal components" if new["hidden"] < sizes["hidden"] else "an equal basis"
        more = f"; the head is untied, {extra} parameters more" if tied else ""
        notes.append(f"the residual stream is rotated to {how}{more}")
        lost = unabsorbed(family, config) if new["hidden"] < sizes["hidden"] else ()
        if lost:
            notes.append(
                f"of the biases of {', '.join(lost)} only what lies in the kept directions stays: "
                "what reads these norms has no bias to take over the rest"
            )
    limit = refit_limit(family)
    refit = bool(settings.refit) and not limit
    means = refit and settings.refit == "mean"
    if settings.refit in (True, "mean") and limit:
        problems.append(_problem("refit", f"{family.model_type}: {limit}", "auto or false"))
    elif settings.refit and limit:
        notes.append(f"nothing is refitted: {limit}")
    if refit:
        how = "to the mean of their output" if means else "by ridge regression, layer after layer"
        notes.append(f"matrices are refitted {how}")
    if means and "experts" in sizes:
        notes.append("experts stay as they are cut")
    elif refit and "experts" in sizes:
        notes.append(
            "experts are refitted one after another, each on the tokens routed to it; the router "
            "is fitted to its norm alone, also where whole experts go"
        )
    if settings.by_axis and not (rotate or refit):
        notes.append("by_axis measures nothing, for nothing is compensated")
    return Decision(
        rotate=rotate,
        untie=rotate and tied,
        refit=refit,
        means=means,
        spread=rotate and settings.spread,
        extra_params=extra if rotate else 0,
        notes=tuple(notes),
        problems=tuple(problems),
    )


def _problem(key: str, cause: str, fix: str) -> Problem:
    return Problem(Code.RECIPE_VALUE, cause, where=f"compensate.{key}", fix=fix)
