"""The recipe: frozen models of every section, strict loading, and --set overrides."""

from paretron.recipe.load import load_recipe, resolve_recipe
from paretron.recipe.models import (
    Calibration,
    Correct,
    Distill,
    Engine,
    Evaluate,
    Export,
    Pretrain,
    Profile,
    Prune,
    Recipe,
    Score,
    Student,
    TextSource,
    TokenisedSource,
    Training,
)

__all__ = [
    "Calibration",
    "Correct",
    "Distill",
    "Engine",
    "Evaluate",
    "Export",
    "Pretrain",
    "Profile",
    "Prune",
    "Recipe",
    "Score",
    "Student",
    "TextSource",
    "TokenisedSource",
    "Training",
    "load_recipe",
    "resolve_recipe",
]
