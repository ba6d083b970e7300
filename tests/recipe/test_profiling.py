"""The profile section: loads by mode, what a sample of a loop has, and who takes which load."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from paretron.recipe import Profile
from paretron.recipe.limits import MODE_KEYS, mode_problems
from paretron_profiling.schema import MODES, OFFLINE

ALL = frozenset(MODES)


def profile_of(**settings: Any) -> Profile:
    return Profile.model_validate({"engines": [{"name": "e"}]} | settings)


def test_loads_are_ascending_and_each_once() -> None:
    profile = profile_of(batches=[8, 1, 8], concurrency=[16, 4], rates=[2.5, 0.5])
    assert profile.loads == {"offline": (1, 8), "closed": (4, 16), "open": (0.5, 2.5)}
    assert set(profile.loads) == set(MODES) == set(MODE_KEYS)
    assert profile_of().loads == {"offline": (1,)}
    assert profile_of(batches=[], rates=[1]).loads == {"open": (1,)}


@pytest.mark.parametrize(
    ("settings", "mode", "load", "requests"),
    [
        ({}, "offline", 4, 4),
        ({"requests": 7}, "offline", 4, 4),
        ({}, "closed", 2, 32),
        ({}, "closed", 16, 128),
        ({"requests": 24}, "closed", 16, 24),
        ({"requests": 7}, "closed", 16, 16),
        ({"requests": 7}, "open", 16, 7),
        ({}, "open", 0.25, 32),
        ({}, "open", 12.5, 100),
    ],
)
def test_requests_of_a_sample(
    settings: dict[str, Any], mode: str, load: float, requests: int
) -> None:
    assert profile_of(**settings).requests_of(mode, load) == requests


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"batches": []}, "at least one of batches, concurrency and rates"),
        ({"sessions": "apart"}, "'auto', 'together' or 'in_turn'"),
        ({"rates": [0]}, "greater than 0"),
        ({"min_seconds": -1}, "greater than or equal to 0"),
        ({"engines": [{"name": "e"}, {"name": "e", "dtype": "float32"}]}, "e stands twice"),
    ],
)
def test_what_no_profile_has(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        profile_of(**settings)


def test_a_load_is_left_to_the_engine_that_takes_it() -> None:
    profile = profile_of(batches=[1], concurrency=[8])
    only = frozenset({OFFLINE})
    assert mode_problems(profile, modes={"eager": only, "server": ALL}) == []
    (alone,) = mode_problems(profile, modes={"eager": only})
    assert (alone.where, "eager" in alone.cause) == ("profile.concurrency", True)
    assert "vllm_server" in alone.fix
    (idle,) = mode_problems(profile_of(batches=[], rates=[1]), modes={"eager": only, "server": ALL})
    assert idle.cause == "nothing is left to measure on eager"
    assert "`batches`" in idle.fix
    # Of names that no engine has, something else is said.
    assert mode_problems(profile, modes={}) == []
