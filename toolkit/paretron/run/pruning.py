"""Cutting one shape out of a stage's model: for students whose shape is stated, or searched."""

from __future__ import annotations

from pathlib import Path

from paretron.artifacts.manifest import Provenance
from paretron.families import Sizes
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
    from paretron.compensate.stage import prune_compensated

    recipe = context.recipe
    prune_compensated(
        context.folders["model"],
        context.folders["scores"],
        context.folders["data"] / "calibration",
        sizes=sizes,
        prune=recipe.prune,
        score=recipe.score,
        compensate=recipe.compensate,
        calibration_settings=recipe.data.calibration,
        seed=recipe.seed,
        out=out,
        provenance=provenance,
        overwrite=overwrite,
        on_event=context.on_event,
    )
