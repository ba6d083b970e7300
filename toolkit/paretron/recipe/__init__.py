"""The recipe: frozen models of every section, strict loading, and --set overrides."""

from paretron.recipe.evaluating import Evaluate
from paretron.recipe.load import load_recipe, resolve_recipe
from paretron.recipe.models import Export, Recipe
from paretron.recipe.profiling import Engine, Profile, Slo
from paretron.recipe.scoring import Score
from paretron.recipe.searching import Budget, Search, Space, Speed
from paretron.recipe.students import Compensate, Prune, Student
from paretron.recipe.tasks import Task
from paretron.recipe.texts import (
    Calibration,
    TextSource,
    TokenisedSource,
    TrainingText,
    WeightedSource,
)
from paretron.recipe.training import Correct, Distill, Pretrain, Training

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
    "Slo",
    "Space",
    "Speed",
    "Student",
    "Task",
    "TextSource",
    "TokenisedSource",
    "Training",
    "TrainingText",
    "WeightedSource",
    "load_recipe",
    "resolve_recipe",
]
