"""How trainings are laid out over devices: what cannot be, for the teacher and every student."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paretron.errors import Problem
from paretron.families import family_of
from paretron.families.cuts import cut_problems
from paretron.families.table import with_sizes
from paretron.plan.cost import ModelFacts
from paretron.recipe import Recipe, Training
from paretron.recipe.devices import device_problems
from paretron.recipe.texts import TrainingText


def parallel_problems(
    recipe: Recipe, config: Mapping[str, Any], students: Mapping[str, ModelFacts]
) -> list[Problem]:
    """What keeps a section's models from being trained as it says; `config` is the teacher's.

    Of a search, the heaviest candidate stands for all.
    """
    family = family_of(config)
    pretrain, text = recipe.teacher.pretrain, recipe.data.train
    cut = [_config(config, student) for student in students.values()]
    trained: list[tuple[str, Training | None, TrainingText, list[Mapping[str, Any]]]] = [
        ("teacher.pretrain", pretrain, pretrain.data if pretrain else text, [config]),
        ("correct", recipe.correct, text, [config]),
        ("distill", recipe.distill, text, [config, *cut]),
    ]
    found = [
        problem
        for where, training, read, configs in trained
        if training is not None
        for each in configs
        for problem in (
            *cut_problems(
                family, each, degree=training.tensor_parallel, where=f"{where}.tensor_parallel"
            ),
            *device_problems(
                training,
                capped=each.get(family.attention_softcap) is not None,
                apart=read.documents == "apart",
                where=where,
            ),
        )
    ]
    return list(dict.fromkeys(found))


def _config(teacher: Mapping[str, Any], student: ModelFacts) -> dict[str, Any]:
    """That of a student, but for which of the layers it has."""
    return with_sizes(family_of(teacher), teacher, student.sizes, kept_layers=None)
