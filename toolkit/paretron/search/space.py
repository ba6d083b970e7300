"""Every shape of a space at once: one array of sizes for each axis of the family's table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

from paretron.errors import Code, Problem
from paretron.families import Sizes
from paretron.recipe import Space

IntArray = npt.NDArray[np.int64]
MOST_SHAPES = 4_000_000  # about 60 bytes each


@dataclass(frozen=True, eq=False)
class Shapes:
    """Shapes side by side: `sizes` has int64 [n] for every axis."""

    sizes: Mapping[str, IntArray]

    def __len__(self) -> int:
        return len(self.sizes["layers"])

    def at(self, number: int) -> dict[str, int]:
        """The sizes of one shape."""
        return {axis: int(values[number]) for axis, values in self.sizes.items()}

    def of(self, numbers: npt.NDArray[np.intp] | npt.NDArray[np.bool_]) -> Shapes:
        """Some of the shapes."""
        return Shapes({axis: values[numbers] for axis, values in self.sizes.items()})


def space_problems(where: str, space: Space, teacher: Sizes) -> list[Problem]:
    """Why a space cannot be searched: sizes above the teacher's, or too many shapes."""
    have = {**teacher, "heads": teacher["kv_heads"] * teacher["q_per_kv"]}
    problems = []
    counts = []
    for axis, choice in space.axes().items():
        sizes = choice.sizes()
        counts.append(len(sizes or choice.times_hidden or ()))
        if axis not in have:
            cause, fix = "the teacher has no such axis", f"leave out {axis}"
        elif sizes and sizes[-1] > have[axis]:
            cause = f"{sizes[-1]} is more than the teacher's {have[axis]}"
            fix = f"at most {have[axis]}"
        else:
            continue
        problems.append(Problem(Code.RECIPE_TARGET, cause, where=f"{where}.{axis}", fix=fix))
    if prod(counts) > MOST_SHAPES:
        cause = f"{prod(counts)} shapes, more than {MOST_SHAPES}"
        fix = "a larger `multiple`, or shorter lists"
        problems.append(Problem(Code.RECIPE_VALUE, cause, where=where, fix=fix))
    return problems


def shapes_of(space: Space, teacher: Sizes) -> Shapes:
    """Every shape of a space that can be cut out of the teacher, the teacher's own left out.

    Query heads must divide over the KV heads in groups no larger than the teacher's; an axis that
    is not searched keeps the teacher's size (its group size, for heads).
    """
    choices = space.axes()
    columns = [np.array(c.sizes() or c.times_hidden) for c in choices.values()]
    grid = np.meshgrid(*columns, indexing="ij")
    flat = {axis: values.ravel() for axis, values in zip(choices, grid, strict=True)}
    length = len(next(iter(flat.values())))
    size: dict[str, IntArray] = {axis: np.full(length, n) for axis, n in teacher.items()}
    size |= {axis: flat[axis].astype(np.int64) for axis in flat if axis in teacher}
    if "ffn" in choices and choices["ffn"].times_hidden:
        size["ffn"] = np.rint(flat["ffn"] * size["hidden"]).astype(np.int64)
    heads = flat["heads"] if "heads" in flat else size["kv_heads"] * teacher["q_per_kv"]
    size["q_per_kv"] = heads // size["kv_heads"]
    valid = heads % size["kv_heads"] == 0
    same = np.ones(length, dtype=bool)
    for axis, n in teacher.items():
        valid &= (size[axis] >= 1) & (size[axis] <= n)
        same &= size[axis] == n
    return Shapes(size).of(valid & ~same)


def ends_of(shapes: Shapes) -> tuple[dict[str, int], dict[str, int]]:
    """The smallest shape and the largest, by the product of their sizes."""
    volume = np.ones(len(shapes))
    for values in shapes.sizes.values():
        volume = volume * values
    return shapes.at(int(volume.argmin())), shapes.at(int(volume.argmax()))


def distinct(shapes: Shapes, axes: list[str]) -> list[dict[str, int]]:
    """Every combination of these axes' sizes once, the smallest first."""
    found = np.unique(np.stack([shapes.sizes[axis] for axis in axes], axis=1), axis=0)
    return [dict(zip(axes, row, strict=True)) for row in found.tolist()]
