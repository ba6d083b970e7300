"""Operator tables: interpolation between rows, silence beyond them, and a first measurement."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paretron.errors import Code, ParetronError
from paretron.families import family_of, sizes
from paretron.recipe import Space, Speed
from paretron.search.costs import most_ms
from paretron.search.space import Shapes, shapes_of
from paretron.search.table import OperatorTable, Phase, Row, given_table, predicted_ms
from paretron.search.timing import LayerTimer, grid_points
from pico import pico_model

SPEED = Speed(ms=10.0, batch=2, lengths=(16, 8))
CONTEXTS: dict[Phase, int] = {"prefill": 16, "decode": 20}
FIXED = {"kv_heads": 2, "q_per_kv": 2, "head_dim": 32}


def layer_seconds(phase: str, hidden: float, ffn: float) -> float:
    """Linear on each axis, so that interpolation must be exact."""
    return (3 if phase == "prefill" else 1) * (1e-3 + 2e-6 * hidden + 1e-8 * hidden * ffn)


def made_table(*, without: int | None = None, failed: int | None = None) -> OperatorTable:
    rows = []
    for phase, context in CONTEXTS.items():
        for hidden, ffn in itertools.product((32, 64), (64, 96)):
            rows.append(
                Row(
                    part="layer", phase=phase, batch=2, context=context,
                    sizes={"hidden": hidden, "ffn": ffn, **FIXED},
                    seconds=layer_seconds(phase, hidden, ffn),
                )
            )  # fmt: skip
        for hidden in (32, 64):
            rows.append(
                Row(
                    part="ends", phase=phase, batch=2, context=context,
                    sizes={"hidden": hidden, "vocab": 320}, seconds=hidden * 1e-6,
                )
            )  # fmt: skip
    if without is not None:
        del rows[without]
    if failed is not None:
        rows[failed] = rows[failed].model_copy(update={"seconds": None})
    return OperatorTable(
        engine="transformers", device="a device", dtype="float32", model_type="llama",
        rows=tuple(rows),
    )  # fmt: skip


def shapes(**sizes: list[int]) -> Shapes:
    length = max(map(len, sizes.values()), default=1)
    full = {"vocab": [320], "layers": [4], "hidden": [64], "ffn": [96]}
    full |= {axis: [n] for axis, n in FIXED.items()} | sizes
    return Shapes({a: np.resize(np.array(v, dtype=np.int64), length) for a, v in full.items()})


@given(st.integers(32, 64), st.integers(64, 96), st.integers(1, 40))
def test_between_rows_it_interpolates(hidden: int, ffn: int, layers: int) -> None:
    (ms,) = predicted_ms(made_table(), shapes(hidden=[hidden], ffn=[ffn], layers=[layers]), SPEED)
    step = {p: layers * layer_seconds(p, hidden, ffn) + hidden * 1e-6 for p in CONTEXTS}
    assert ms == pytest.approx(1000 * (step["prefill"] + 7 * step["decode"]))


@pytest.mark.parametrize(
    "outside",
    [{"hidden": 65}, {"hidden": 31}, {"ffn": 128}, {"kv_heads": 1}, {"vocab": 321}],
    ids=str,
)
def test_beyond_the_rows_it_says_nothing(outside: dict[str, int]) -> None:
    found = predicted_ms(made_table(), shapes(**{a: [n] for a, n in outside.items()}), SPEED)
    assert np.isnan(found).all()


@pytest.mark.parametrize(
    "speed",
    [
        SPEED.model_copy(update={"batch": 1}),
        SPEED.model_copy(update={"lengths": (16, 64)}),
        SPEED.model_copy(update={"lengths": (8, 8)}),
    ],
)
def test_another_batch_or_context_is_not_guessed(speed: Speed) -> None:
    assert np.isnan(predicted_ms(made_table(), shapes(), speed)).all()


@pytest.mark.parametrize("number", range(12))
@pytest.mark.parametrize("how", ["without", "failed"])
def test_beside_a_gap_it_says_nothing(how: str, number: int) -> None:
    near = shapes(hidden=[40, 32, 64], ffn=[80, 64, 96])
    whole = predicted_ms(made_table(), near, SPEED)
    holed = predicted_ms(made_table(**{how: number}), near, SPEED)
    assert np.isfinite(whole).all()
    assert np.isnan(holed[0])  # between all rows, the gap among them
    known = np.isfinite(holed)
    assert (holed[known] == whole[known]).all()  # a gap away from a shape changes nothing


def test_it_is_read_back_and_refused_when_it_is_not_one(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    made_table(failed=0).save(path)
    assert OperatorTable.load(path) == made_table(failed=0)
    asked = Speed(ms=1.0, table=str(path))
    fits = {"model_type": "llama", "dtype": "float32"}
    assert given_table(asked, **fits) == made_table(failed=0)
    assert given_table(Speed(ms=1.0), **fits) is None
    of_vllm = asked.model_copy(update={"engine": "vllm"})
    for speed, other in (
        (asked, {"model_type": "qwen2"}),
        (asked, {"dtype": "bfloat16"}),
        (of_vllm, {}),
    ):
        with pytest.raises(ParetronError) as caught:
            given_table(speed, **(fits | other))
        assert caught.value.problems[0].code is Code.RECIPE_VALUE
    for change in ({"rows": [{"part": "layer"}]}, {"engine": 3}, {"more": 1}):
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(ParetronError) as caught:
            OperatorTable.load(path)
        assert caught.value.problems[0].code is Code.INPUT_CONFIG
    path.unlink()
    with pytest.raises(ParetronError) as caught:
        OperatorTable.load(path)
    assert caught.value.problems[0].code is Code.INPUT_MISSING


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_a_row_of_no_time_is_no_row(seconds: float) -> None:
    good = made_table().rows[0].model_dump()
    with pytest.raises(ValueError, match="seconds"):
        Row.model_validate(good | {"seconds": seconds})


def test_both_ways_of_saying_a_speed_agree() -> None:
    assert most_ms(Speed(tokens_s=100, batch=2, lengths=(16, 50))) == 1000
    assert most_ms(Speed(ms=7.5)) == 7.5


@pytest.mark.parametrize("family", ["llama", "nemotron"])
def test_shapes_are_timed_with_random_weights(family: str) -> None:
    config: dict[str, Any] = pico_model(family).config.to_dict()
    space = Space.model_validate({"hidden": [48, 56, 64], "layers": [2, 3, 4], "kv_heads": [1, 2]})
    of = family_of(config)
    wanted = shapes_of(space, sizes(of, config))
    speed = Speed(ms=1.0, batch=2, lengths=(16, 8), repeats=2)
    table = LayerTimer(of, config, "float32", speed).table(grid_points(wanted))
    ms = predicted_ms(table, wanted, speed)
    assert np.isfinite(ms).all()
    assert (ms > 0).all()
    # 3 hidden x 2 groups of layers and 3 pairs of ends, each in both phases; depth is not timed.
    assert len(table.rows) == 2 * (6 + 3)
    size = wanted.sizes
    narrow = (size["hidden"] == 48) & (size["kv_heads"] == 1)
    two, three, four = ms[narrow][size["layers"][narrow].argsort()]
    assert two < three < four


def test_a_large_space_is_timed_on_three_sizes_an_axis() -> None:
    config: dict[str, Any] = pico_model("llama").config.to_dict()
    space = Space.model_validate(
        {"hidden": {"from": 8, "to": 64, "multiple": 8}, "ffn": {"from": 1, "to": 96}}
    )
    wanted = shapes_of(space, sizes(family_of(config), config))
    points = grid_points(wanted)
    assert {a: sorted(set(v.tolist())) for a, v in points.sizes.items() if a in ("hidden", "ffn")} \
        == {"hidden": [8, 32, 64], "ffn": [1, 48, 96]}  # fmt: skip
    for axis, values in wanted.sizes.items():
        if axis != "layers":
            assert points.sizes[axis].min() <= values.min()
            assert points.sizes[axis].max() >= values.max()
