from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paretron.data.order import window_id
from paretron.distill.schedule import Place, Schedule, learning_rate, place_after
from paretron.errors import Code, ParetronError
from paretron.recipe import Distill


def rate(step: int, *, steps: int, warmup: int = 10) -> float:
    return learning_rate(step, steps=steps, peak=1e-3, floor=1e-5, warmup_steps=warmup)


def phased(*phases: dict[str, Any], **settings: Any) -> Schedule:
    given = {"global_batch": 4, "lr": 1e-3, "min_lr": 1e-5, "warmup_steps": 0}
    text = Distill.model_validate(given | {"phases": list(phases)} | settings)
    return Schedule.of(text, seq_len=100)


def places(schedule: Schedule) -> list[Place]:
    found, place = [], schedule.entered(Place())
    while place.phase < len(schedule.legs):
        found.append(place)
        place = schedule.after(place)
    return found


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
    assert Schedule.of(settings, seq_len=100).left(Place()) == (2, 800)
    with pytest.raises(ParetronError) as caught:
        Schedule.of(settings, seq_len=300)
    assert caught.value.problems[0].code is Code.RECIPE_VALUE
    with pytest.raises(ParetronError) as caught:
        phased({"seq_len": 100, "tokens": 400}, {"seq_len": 300, "tokens": 1000})
    assert caught.value.problems[0].where == "phases.1.tokens"


def test_one_phase_reads_as_it_always_did() -> None:
    schedule = Schedule.of(Distill(tokens=5000, global_batch=4, warmup_steps=3), seq_len=100)
    steps = places(schedule)
    assert len(steps) == 12
    for step, place in enumerate(steps):
        ids = schedule.window_ids(place, num_blocks=30, seed=5)
        assert ids == [window_id(4 * step + k, num_windows=30, seed=5) for k in range(4)]
        assert schedule.learning_rate(place) == learning_rate(
            step, steps=12, peak=1e-4, floor=1e-5, warmup_steps=3
        )


def test_a_phase_goes_on_along_the_curve_unless_it_states_its_own() -> None:
    lengths = ({"seq_len": 10, "tokens": 400}, {"seq_len": 20, "tokens": 800})
    together = phased(*lengths)
    rates = [together.learning_rate(p) for p in places(together)]
    assert len(rates) == 20
    assert rates == [rate(s, steps=20, warmup=0) for s in range(20)]
    own = phased(lengths[0], lengths[1] | {"lr": 5e-4, "min_lr": 0.0})
    rates = [own.learning_rate(p) for p in places(own)]
    assert rates[:10] == [rate(s, steps=10, warmup=0) for s in range(10)]
    assert rates[10] == 5e-4
    assert rates[19] == 0.0


def test_phases_have_windows_and_batches_of_their_own() -> None:
    schedule = phased(
        {"seq_len": 10, "tokens": 100},
        {"seq_len": 40, "tokens": 500, "global_batch": 3},
        {"seq_len": 20, "tokens": 80},
    )
    steps = places(schedule)
    assert [p.phase for p in steps] == [0] * 2 + [1] * 4 + [2]
    assert schedule.left(steps[0]) == (7, 80 + 480 + 80)
    assert schedule.left(steps[3]) == (4, 440)
    sizes = [len(schedule.window_ids(p, num_blocks=50, seed=0)) for p in steps]
    assert sizes == [4, 4, 3, 3, 3, 3, 4]


@given(
    lengths=st.lists(st.sampled_from([2, 4, 8]), min_size=1, max_size=4),
    batches=st.lists(st.integers(1, 5), min_size=1, max_size=20),
    tokens=st.integers(40, 200),
    num_blocks=st.integers(8, 60),
)
def test_any_sequence_of_batches_reads_the_same_tokens_once_an_epoch(
    lengths: list[int], batches: list[int], tokens: int, num_blocks: int
) -> None:
    """The batch changes before every step, as if resumed there."""
    phases = [{"seq_len": n, "tokens": tokens} for n in lengths]
    read: list[tuple[int, list[int]]] = []  # phase, tokens of a window, in order
    history: list[dict[str, float]] = []
    seen = step = 0
    while True:
        schedule = phased(*phases, global_batch=batches[step % len(batches)])
        place = schedule.entered(place_after(history))
        if place.phase == len(phases):
            break
        size = lengths[place.phase]
        for window in schedule.window_ids(place, num_blocks=num_blocks, seed=1):
            read.append((place.phase, list(range(window * size, (window + 1) * size))))
        seen += schedule.leg(place).tokens_per_step
        history.append({"tokens": seen, "phase": place.phase})
        step += 1
    block = max(lengths)
    for number, length in enumerate(lengths):
        of_phase = [t for phase, window in read if phase == number for t in window]
        # what is left out is less than one step of any batch
        assert tokens - 5 * length < len(of_phase) <= tokens
        in_order = phased(*phases, global_batch=1)
        wanted = [
            in_order.window_ids(Place(number, k * length), num_blocks=num_blocks, seed=1)[0]
            for k in range(len(of_phase) // length)
        ]
        windows = [window[0] // length for phase, window in read if phase == number]
        assert windows == wanted
    blocks_used = sum(-(-tokens // block) for _ in lengths)
    most = -(-blocks_used // num_blocks)
    counts = Counter(t for _, window in read for t in window)
    assert max(counts.values()) <= most


def test_a_training_that_grows_its_batch_keeps_its_curve() -> None:
    small, large = (
        Schedule.of(Distill(tokens=8000, global_batch=n, warmup_steps=0), seq_len=10)
        for n in (4, 16)
    )
    half = Place(0, 4000)
    assert small.left(half) == (100, 4000)
    assert large.left(half) == (25, 4000)
    assert math.isclose(small.learning_rate(half), large.learning_rate(half), rel_tol=0.03)
    last = Place(0, 8000 - 160)
    assert math.isclose(large.learning_rate(last), 1e-5)
