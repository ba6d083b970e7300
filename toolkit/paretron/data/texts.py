"""The texts that an artifact is made by and judged on, as token stores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from paretron.recipe import Recipe


@dataclass(frozen=True)
class Texts:
    """Stores of tokens: `samples` windows of one calibrate, the other is held out.

    Lengths are those of windows, in tokens; `seed` chooses the windows.
    """

    calibration: Path
    calibration_seq_len: int
    samples: int
    validation: Path
    validation_seq_len: int
    seed: int

    @classmethod
    def of(cls, recipe: Recipe, folder: Path) -> Texts:
        """Those of a recipe, in the folder of its data."""
        text = recipe.data.calibration
        return cls(
            calibration=folder / "calibration",
            calibration_seq_len=text.seq_len,
            samples=text.samples,
            validation=folder / "validation",
            validation_seq_len=recipe.data.validation.seq_len,
            seed=recipe.seed,
        )
