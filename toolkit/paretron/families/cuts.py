"""How the matrices of a family are cut over several devices (tensor parallelism).

Heads, MLP neurons and the vocabulary are shared out. A matrix that writes one of them keeps some of
its rows, one that reads it some of its columns (Shoeybi et al. 2019, Megatron-LM, section 3), and
all else is whole everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from paretron.errors import Code, Problem
from paretron.families.counts import placed_tensors
from paretron.families.table import Family, Tensor, sizes

# Query heads go with the key-value head that they share.
CUT_AXES = ("kv_heads", "ffn", "vocab")
_MEANING = {"kv_heads": "key-value heads", "ffn": "MLP neurons", "vocab": "rows of the vocabulary"}

Cut = Literal["rows", "columns", "whole", "whole, of some heads"]


def cut_of(row: Tensor) -> Cut:
    """What a device keeps of a weight of a family that `cut_problems` lets through.

    A weight over the channels of one head is whole, but each device applies it to its own heads.
    """
    cut = [any(axis in CUT_AXES for segment in dim for axis in segment) for dim in row.dims]
    if any(cut):
        return "rows" if cut[0] else "columns"
    return "whole, of some heads" if row.dims == ((("head_dim",),),) else "whole"


def module_cuts(family: Family, config: Mapping[str, Any]) -> dict[str, Cut]:
    """Module -> what a device keeps of its weight; of a tied lm_head the embedding tells."""
    return {
        place.name.removesuffix(".weight"): cut_of(place.row)
        for place in placed_tensors(family, config)
        if place.name.endswith(".weight")
    }


def cut_problems(
    family: Family, config: Mapping[str, Any], *, degree: int, where: str
) -> list[Problem]:
    """Why a model cannot be cut over `degree` devices: its kind of matrices, or its sizes."""
    if degree == 1:
        return []
    size = sizes(family, config)
    present = [
        row for layer in (None, *range(size["layers"])) for row in family.rows(config, layer)
    ]
    rows = tuple(dict.fromkeys(present))
    problems = [
        Problem(
            Code.UNSUPPORTED,
            f"this {family.model_type} has {obstacle}",
            where=where,
            fix="tensor_parallel: 1",
        )
        for obstacle in dict.fromkeys(filter(None, map(_obstacle, rows)))
    ]
    axes = [a for a in CUT_AXES if any(a in s for row in rows for dim in row.dims for s in dim)]
    return problems + [
        Problem(
            Code.RECIPE_VALUE,
            f"{size[axis]} {_MEANING[axis]} ({axis}) do not divide over {degree} processes",
            where=where,
            fix=f"{_divisors(size, axes)}, or another {axis}",
        )
        for axis in axes
        if not problems and size[axis] % degree
    ]


def _obstacle(row: Tensor) -> str:
    """Why a tensor cannot be cut, or nothing."""
    name = row.name.rpartition(".layers.{i}.")[2]
    axes = {axis for dim in row.dims for segment in dim for axis in segment}
    if axes & {"experts", "moe_ffn"}:
        return "experts, whose matrices are not cut"
    if not axes & set(CUT_AXES):
        return ""
    if any(len(dim) > 1 for dim in row.dims):
        return f"{name}, in which several matrices are joined"
    if len(row.dims) == 1 and row.name.endswith(".weight"):
        return f"{name}, a norm over all heads at once"
    return ""


def _divisors(size: Mapping[str, int], axes: list[str]) -> str:
    possible = [d for d in (2, 4, 8, 16) if not any(size[axis] % d for axis in axes)]
    return f"tensor_parallel: {' or '.join(map(str, [1, *possible]))}"
