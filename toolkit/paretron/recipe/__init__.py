"""The recipe: frozen models of every section, strict loading, and --set overrides."""

from paretron.recipe.load import load_recipe, resolve_recipe
from paretron.recipe.models import (
    Calibration,
    Compensate,
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
from paretron.recipe.searching import Budget, Search, Space, Speed

__all__ = [
    "Budget",
    "Calibration",
    "Compensate",
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
    "Search",
    "Space",
    "Speed",
    "Student",
    "TextSource",
    "TokenisedSource",
    "Training",
    "load_recipe",
    "resolve_recipe",
]
