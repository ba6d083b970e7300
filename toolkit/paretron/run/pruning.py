"""Cutting one shape out of a model: by its scores, in rounds or not, compensated or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from paretron.artifacts.manifest import Provenance
from paretron.families import Sizes
from paretron.recipe import Recipe
from paretron.run.events import OnEvent
from paretron.run.runner import Context


def prune_to(
    context: Context,
    sizes: Sizes,
    *,
    out: Path,
    provenance: Provenance,
    overwrite: bool = False,
) -> None:
    """Prune the stage's model by its scores to these sizes, compensated as the recipe says."""
    prune_model(
        context.folders["model"],
        context.folders["scores"],
        context.folders["data"] / "calibration",
        recipe=context.recipe,
        sizes=sizes,
        out=out,
        state=context.state,
        provenance=provenance,
        overwrite=overwrite,
        on_event=context.on_event,
    )


def prune_model(
    model: Path,
    scores: Path,
    calibration: Path,
    *,
    recipe: Recipe,
    sizes: Sizes,
    out: Path,
    state: Path,
    provenance: Provenance | Callable[[], Provenance],
    overwrite: bool = False,
    on_event: OnEvent,
) -> None:
    """Prune a model as a recipe says; `calibration` is a token store.

    In `state` lies what rounds that were killed need not do again.
    """
    from paretron.compensate.stage import prune_compensated
    from paretron.run.rounds import select_in_rounds

    selection = None
    if recipe.score.rounds > 1:
        selection = select_in_rounds(
            model,
            scores,
            calibration,
            sizes=sizes,
            score=recipe.score,
            calibration_settings=recipe.data.calibration,
            seed=recipe.seed,
            state=state,
            on_event=on_event,
        )
    prune_compensated(
        model,
        scores,
        calibration,
        sizes=sizes,
        prune=recipe.prune,
        score=recipe.score,
        compensate=recipe.compensate,
        calibration_settings=recipe.data.calibration,
        seed=recipe.seed,
        out=out,
        provenance=provenance,
        selection=selection,
        overwrite=overwrite,
        on_event=on_event,
    )
