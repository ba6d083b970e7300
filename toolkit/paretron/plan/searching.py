"""What a search will look at, before anything runs: its space's ends, and how many candidates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from paretron.artifacts.config import DTYPE_NAMES, relabel
from paretron.artifacts.serving import vllm_limit
from paretron.errors import ParetronError, Problem
from paretron.families import Family, Sizes, family_of, sizes
from paretron.families.cuts import cut_problems
from paretron.families.table import with_sizes
from paretron.plan.cost import ModelFacts, model_facts
from paretron.plan.plan import export_problems, find_exporters
from paretron.plan.shapes import target_problems
from paretron.recipe import Recipe, Search, Student
from paretron.search.candidates import all_hold, refuse_none, refuse_unfit, select
from paretron.search.costs import measures
from paretron.search.space import ends_of, shapes_of, space_problems
from paretron.search.table import given_table


@dataclass(frozen=True)
class SearchOutlook:
    """A search as far as counting goes.

    `candidates` is None where shapes have to be timed first. The ends are those of the space;
    `heaviest` is the largest shape within the budget, which estimates are for.
    """

    shapes: int
    candidates: int | None
    smallest: ModelFacts
    largest: ModelFacts
    heaviest: ModelFacts
    lost_layers: tuple[int, ...]

    def as_json(self) -> dict[str, Any]:
        """The stable form in `plan --json`."""
        return {
            "shapes": self.shapes,
            "candidates": self.candidates,
            "smallest": self.smallest.as_json(),
            "largest": self.largest.as_json(),
            "lost_layers": list(self.lost_layers),
        }


def search_outlook(
    name: str,
    search: Search,
    recipe: Recipe,
    *,
    config: Mapping[str, Any],
    dtype: str,
) -> tuple[SearchOutlook | None, tuple[Problem, ...]]:
    """The outlook of a student's search, or why there is none: all that counting can say.

    `dtype` is the student's, as safetensors names it.
    """
    where = f"students.{name}.search"
    family = family_of(config)
    teacher = sizes(family, config)
    if problems := space_problems(f"{where}.space", search.space, teacher):
        return None, tuple(problems)
    shapes = shapes_of(search.space, teacher)
    speed = search.budget.speed
    try:
        table = given_table(speed, model_type=family.model_type, dtype=DTYPE_NAMES[dtype])
        budget = measures(
            search.budget, shapes, family=family, config=config, dtype=dtype, table=table
        )
        refuse_none(where, shapes, budget)
        count = None
        if speed is None or table is not None:
            can = servable(recipe, config)
            found = select(shapes, budget, servable=can, widest=search.widest)
            refuse_unfit(where, found, search)
            count = len(found)
        inside = shapes.of(all_hold(shapes, budget))
        small, large, heavy = (
            _facts(size, family=family, config=config, dtype=dtype)
            for size in (*ends_of(shapes), ends_of(inside)[1])
        )
    except ParetronError as error:
        return None, error.problems
    lost = sorted({teacher["layers"] - n for n in inside.sizes["layers"].tolist()} - {0})
    return SearchOutlook(len(shapes), count, small, large, heavy, tuple(lost)), ()


def servable(recipe: Recipe, config: Mapping[str, Any]) -> Callable[[Sizes], bool]:
    """Whether a shape can be pruned to, exported by every export, and run by the engines named."""
    family = family_of(config)
    teacher = sizes(family, config)
    exporters, _ = find_exporters(recipe)
    degree = recipe.distill.tensor_parallel
    profile = recipe.profile
    on_vllm = profile is not None and any(e.name == "vllm" for e in profile.engines)

    def can(size: Sizes) -> bool:
        target = student_of(size)
        if target_problems("search", teacher, target, family=family, config=config):
            return False
        try:
            new = relabel(_config(size, family=family, config=config))
        except ParetronError:
            return False
        if on_vllm and vllm_limit(new):
            return False
        if cut_problems(family, new, degree=degree, where="distill"):
            return False
        return not export_problems(exporters, new, "search")

    return can


def student_of(size: Sizes) -> Student:
    """The sizes as a recipe states a student."""
    stated = {axis: size[axis] for axis in Student.model_fields if axis in size}
    return Student.model_validate({**stated, "heads": size["kv_heads"] * size["q_per_kv"]})


def _facts(size: Sizes, *, family: Family, config: Mapping[str, Any], dtype: str) -> ModelFacts:
    return model_facts(_config(size, family=family, config=config), dtype=dtype)


def _config(size: Sizes, *, family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """A config of that shape; which layers stay is not known yet."""
    return with_sizes(family, config, size, kept_layers=tuple(range(size["layers"])))
