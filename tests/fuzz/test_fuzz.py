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


def hold(case: Case, random: Random, scratch: Path) -> None:
    result = run_case(case, random, scratch)
    assert not result.failure
    assert result.growth_kb < MAX_GROWTH_KB


@settings(same_cases, max_examples=1200)
@given(random=st.randoms(use_true_random=False))
def test_any_model_is_read_or_refused(random: Random, models: Case, scratch: Path) -> None:
    hold(models, random, scratch)


@settings(same_cases, max_examples=450)
@given(random=st.randoms(use_true_random=False))
def test_any_recipe_is_read_or_refused(random: Random, recipes: Case, scratch: Path) -> None:
    hold(recipes, random, scratch)
