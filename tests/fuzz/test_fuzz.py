"""A minute of fuzzing, the same cases every time; `python -m fuzz.long` runs as long as asked."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz.bases import make_bases
from fuzz.targets import (
    MAX_GROWTH_KB,
    Case,
    model_case,
    recipe_case,
    run_case,
)

same_cases = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def models(scratch: Path) -> Case:
    return model_case(make_bases(scratch / "bases"))


@pytest.fixture(scope="module")
def recipes() -> Case:
    return recipe_case()


def hold(case: Case, seed: int, scratch: Path) -> None:
    """Of one number each, so that a case is what `fuzz.long` calls it by and nothing else."""
    result = run_case(case, Random(seed), scratch)
    assert not result.failure
    assert result.growth_kb < MAX_GROWTH_KB


@settings(same_cases, max_examples=1200)
@given(seed=st.integers(0, 2**64 - 1))
def test_any_model_is_read_or_refused(seed: int, models: Case, scratch: Path) -> None:
    hold(models, seed, scratch)


@settings(same_cases, max_examples=450)
@given(seed=st.integers(0, 2**64 - 1))
def test_any_recipe_is_read_or_refused(seed: int, recipes: Case, scratch: Path) -> None:
    hold(recipes, seed, scratch)
