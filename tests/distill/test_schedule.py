from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paretron.distill.schedule import learning_rate, num_steps
from paretron.errors import Code, ParetronError
from paretron.recipe import Distill


def rate(step: int, *, steps: int, warmup: int = 10) -> float:
    return learning_rate(step, steps=steps, peak=1e-3, floor=1e-5, warmup_steps=warmup)


def test_warm_up_is_linear_and_moves_at_once() -> None:
    assert [round(rate(s, steps=100) * 11e3, 9) for s in range(11)] == list(range(1, 12))


def test_the_cosine_starts_at_the_peak_passes_its_middle_and_ends_at_the_floor() -> None:
    assert rate(10, steps=111) == 1e-3
    assert math.isclose(rate(60, steps=111), (1e-3 + 1e-5) / 2)
    assert math.isclose(rate(110, steps=111), 1e-5)


@given(steps=st.integers(1, 500), warmup=st.integers(0, 600))
def test_every_step_has_a_rate_between_nothing_and_the_peak(steps: int, warmup: int) -> None:
    rates = [rate(s, steps=steps, warmup=warmup) for s in range(steps)]
    assert all(0 < r <= 1e-3 for r in rates)
    falling = rates[warmup:]
    assert falling == sorted(falling, reverse=True)
    assert rates[:warmup] == sorted(rates[:warmup])


def test_steps_are_whole_and_at_least_one() -> None:
    settings = Distill(tokens=1000, global_batch=4, min_lr=0)
    assert num_steps(settings, seq_len=100) == 2
    with pytest.raises(ParetronError) as caught:
        num_steps(settings, seq_len=300)
    assert caught.value.problems[0].code is Code.RECIPE_VALUE
