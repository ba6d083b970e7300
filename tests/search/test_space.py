"""Enumeration: the published table exactly, counts exact on every shape, a million in seconds."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from makers import PicoMaker
from paretron.artifacts.config import family_and_config
from paretron.errors import Code, ParetronError
from paretron.families import family_of, parameter_counts, sizes
from paretron.families.table import with_sizes
from paretron.plan.cost import model_facts
from paretron.recipe.searching import Budget, Space
from paretron.search.candidates import refuse_none, select
from paretron.search.costs import measures
from paretron.search.space import shapes_of, space_problems
from pico import PICO_FAMILIES
from published import LLAMA, NEMOTRON, PUBLISHED

# Paper 1, table 19: (layers, heads, MLP, embedding).
TABLE_19 = {
    (32, 32, 12800, 5120), (32, 32, 13824, 4608), (32, 48, 11520, 4608), (32, 48, 16384, 4096),
    (31, 32, 12800, 5120), (31, 32, 16128, 4608), (31, 48, 13824, 4608), (31, 48, 16384, 4096),
    (30, 32, 12800, 5120), (30, 32, 16128, 4608), (30, 48, 13824, 4608), (30, 48, 16384, 4096),
    (29, 32, 12800, 5120), (29, 32, 16128, 4608), (29, 48, 13824, 4608),
}  # fmt: skip
SPACE_19 = {
    "layers": [29, 30, 31, 32],
    "heads": [32, 48],
    "ffn": {"times_hidden": [2.5, 3, 3.5, 4]},
    "hidden": [4096, 4608, 5120, 5632, 6144],
}
EVERY_MEASURE = {
    "params": 1e18,
    "non_embedding_params": 1e18,
    "active_params": 1e18,
    "memory": {"bytes": 1e18, "batch": 3, "context": 100},
    "flops": {"per_token": 1e18, "context": 64},
}


def enumerated(config: dict[str, Any], space: dict[str, Any], budget: dict[str, Any]) -> Any:
    family = family_of(config)
    shapes = shapes_of(Space.model_validate(space), sizes(family, config))
    asked = Budget.model_validate(budget)
    return shapes, measures(asked, shapes, family=family, config=config, dtype="BF16")


def test_table_19() -> None:
    shapes, budget = enumerated(NEMOTRON, SPACE_19, {"params": [7.8e9, 8.5e9]})
    found = select(shapes, budget, servable=lambda size: True, widest=True)
    rows = {
        (
            c.sizes["layers"], c.sizes["kv_heads"] * c.sizes["q_per_kv"], c.sizes["ffn"],
            c.sizes["hidden"],
        )
        for c in found
    }  # fmt: skip
    assert rows == TABLE_19
    assert len(found) == 15


def test_what_cannot_be_served_gives_way_to_the_next_widest() -> None:
    shapes, budget = enumerated(NEMOTRON, SPACE_19, {"params": [7.0e9, 8.5e9]})
    found = select(
        shapes, budget, servable=lambda size: size["ffn"] not in (16384, 16128), widest=True
    )
    kinds = {(c.sizes["layers"], c.sizes["q_per_kv"], c.sizes["hidden"]): c.sizes for c in found}
    assert kinds[32, 6, 4096]["ffn"] == 14336
    assert kinds[29, 4, 4608]["ffn"] == 13824


@pytest.mark.parametrize("shape", PUBLISHED, ids=lambda s: s.name)
def test_counts_of_the_published_shapes(shape: Any) -> None:
    # The student in a space of two values an axis, so that it is one of several.
    wanted = {"hidden": 4096, "ffn": 11520} if shape.student is None else _axes(shape.student)
    space = {axis: [size, size - 128 if size > 128 else size - 1] for axis, size in wanted.items()}
    shapes, (params, without) = enumerated(
        shape.config, space, {"params": 1e18, "non_embedding_params": 1e18}
    )
    for k in range(len(shapes)):
        config = with_sizes(
            family_of(shape.config), shape.config, shapes.at(k),
            kept_layers=tuple(range(shapes.at(k)["layers"])),
        )  # fmt: skip
        counts = parameter_counts(family_of(config), config)
        assert (params.values[k], without.values[k]) == (counts.total, counts.non_embedding)
    if shape.student is not None:
        assert shape.rounded(int(params.values.max()), shape.total) == shape.total


def _axes(student: str) -> dict[str, int]:
    parts = (part.split(":") for part in student.strip("{}").split(","))
    return {axis.strip(): int(size) for axis, size in parts}


@pytest.mark.parametrize("name", [*PICO_FAMILIES, "mixtral"])
def test_every_measure_is_that_of_the_config(name: str, pico: PicoMaker) -> None:
    family, config = family_and_config(pico(name))
    have = sizes(family, config)
    space: dict[str, Any] = {"layers": [2, 3, 4], "hidden": [48, 64]}
    for axis in ("ffn", "moe_ffn", "experts"):
        if axis in have:
            space[axis] = [have[axis] - 1, have[axis]]
    if have["kv_heads"] > 1:
        space |= {"kv_heads": [1, have["kv_heads"]]}
    shapes, found = enumerated(config, space, EVERY_MEASURE)
    by_name = {m.name: m.values for m in found}
    assert len(shapes) > 10
    for k in range(len(shapes)):
        kept = tuple(range(shapes.at(k)["layers"]))
        facts = model_facts(
            with_sizes(family, config, shapes.at(k), kept_layers=kept), dtype="BF16"
        )
        assert by_name["params"][k] == facts.params
        assert by_name["non_embedding_params"][k] == facts.non_embedding_params
        assert by_name["active_params"][k] == facts.active_params
        assert by_name["memory_bytes"][k] == facts.weight_bytes + 300 * facts.kv_bytes_per_token
        assert by_name["flops_per_token"][k] == facts.forward_flops(tokens=1, seq_len=64)


def test_layers_of_several_kinds_are_refused(pico: PicoMaker) -> None:
    _, config = family_and_config(pico("qwen3_moe"))
    with pytest.raises(ParetronError) as caught:
        enumerated(config, {"layers": [2]}, {"params": 1e9})
    assert caught.value.problems[0].code is Code.UNSUPPORTED


def test_a_million_shapes_in_seconds() -> None:
    space = {
        "layers": {"from": 9, "to": 32},
        "hidden": {"from": 2048, "to": 4096, "multiple": 32},
        "ffn": {"from": 4096, "to": 14336, "multiple": 64},
        "heads": [16, 24, 32],
        "kv_heads": [8],
    }
    began = time.perf_counter()
    shapes, budget = enumerated(LLAMA, space, {"params": [4.4e9, 4.5e9]} | {
        "flops": {"per_token": 1e12, "context": 4096}
    })  # fmt: skip
    found = select(shapes, budget, servable=lambda size: True, widest=True)
    seconds = time.perf_counter() - began
    assert len(shapes) > 700_000
    assert seconds < 20  # about 0.5 alone; the machine may be shared
    # The widest: 64 more neurons would be too many parameters or too wide for the teacher.
    for c in found[:: max(1, len(found) // 50)]:
        wider = {**c.sizes, "ffn": c.sizes["ffn"] + 64}
        config = with_sizes(
            family_of(LLAMA), LLAMA, wider, kept_layers=tuple(range(wider["layers"]))
        )
        more = parameter_counts(family_of(LLAMA), config).total
        assert more > 4.5e9 or wider["ffn"] > 14336


def test_shapes_that_cannot_be_cut_are_none() -> None:
    space = {"heads": [6, 12, 32], "kv_heads": [2, 8], "layers": [32]}
    shapes, _ = enumerated(LLAMA, space, {"params": 1e18})
    every = map(shapes.at, range(len(shapes)))
    pairs = {(s["kv_heads"], s["kv_heads"] * s["q_per_kv"]) for s in every}
    # 6 and 12 do not divide over 8, 12 and 32 over 2 are larger groups than the teacher's 4, and
    # (8, 32) is the teacher itself.
    assert pairs == {(2, 6)}


def test_sizes_above_the_teacher_and_too_many_shapes_are_said() -> None:
    have = sizes(family_of(LLAMA), LLAMA)
    space = Space.model_validate({"hidden": [8192], "layers": {"from": 1, "to": 40}})
    found = space_problems("students.best.search.space", space, have)
    assert [p.code for p in found] == [Code.RECIPE_TARGET, Code.RECIPE_TARGET]
    assert [p.where.rpartition(".")[2] for p in found] == ["hidden", "layers"]
    assert [p.fix for p in found] == ["at most 4096", "at most 32"]
    vast = {axis: {"from": 1, "to": 2048} for axis in ("hidden", "ffn")} | {"layers": [16]}
    (problem,) = space_problems("space", Space.model_validate(vast), have)
    assert problem.code is Code.RECIPE_VALUE
    assert "4194304" in problem.cause


@pytest.mark.parametrize(
    ("budget", "nearest"),
    [
        ({"params": 1e9}, "layers 16, hidden 2048, ffn 4096, heads 32, kv_heads 8"),
        ({"params": [7.9e9, 8.0e9]}, "layers 32, hidden 4096, ffn 8192, heads 32, kv_heads 8"),
    ],
)
def test_an_unreachable_budget_names_the_nearest(budget: dict[str, Any], nearest: str) -> None:
    space = {"layers": [16, 32], "hidden": [2048, 4096], "ffn": [4096, 8192]}
    shapes, found = enumerated(LLAMA, space, budget)
    with pytest.raises(ParetronError) as caught:
        refuse_none("students.best.search", shapes, found)
    (problem,) = caught.value.problems
    assert problem.code is Code.RECIPE_TARGET
    assert nearest in problem.fix
    assert "nearest reachable: params" in problem.fix


def test_the_nearest_is_really_the_nearest() -> None:
    space = {"layers": {"from": 8, "to": 24}, "hidden": {"from": 2048, "to": 4096, "multiple": 256}}
    shapes, (params,) = enumerated(LLAMA, space, {"params": [4.50e9, 4.5001e9]})
    with pytest.raises(ParetronError) as caught:
        refuse_none("search", shapes, (params,))
    distance = np.maximum(params.values / 4.5001e9, 4.50e9 / params.values)
    assert f"{params.values[distance.argmin()]:.6g}" in caught.value.problems[0].fix
