"""An operator table: measured seconds of one layer and of both ends, read with interpolation.

A row holds the time of one decoder layer, or of everything outside of the layers (embedding, final
norm, head), for one step of a batch: `prefill` of `context` tokens, or `decode` of one token behind
`context`. Between rows the reader interpolates linearly on every axis; outside of what was
measured, or next to a row that failed, it knows nothing: NaN, which no budget takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from paretron.artifacts.jsonfile import dump, read_object
from paretron.errors import Code, ParetronError, Problem
from paretron.recipe import Speed
from paretron.search.space import Shapes

FloatArray = npt.NDArray[np.float64]
Part = Literal["layer", "ends"]
Phase = Literal["prefill", "decode"]
ENDS = ("hidden", "vocab")  # what the time outside of the layers depends on
NO_LAYER = ("layers", "vocab")  # what one layer's time does not depend on


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Row(_Strict):
    """One figure: median seconds of `repeats`, None where measuring failed; spread is (max-min)."""

    part: Part
    phase: Phase
    sizes: Mapping[str, int]
    batch: int
    context: int
    seconds: float | None = Field(gt=0)
    spread: float | None = None
    repeats: int = 1


class OperatorTable(_Strict):
    """What was measured, on what: `dtype` is a torch name, `model_type` the layers' family."""

    schema_: Literal[1] = Field(default=1, alias="schema")
    engine: str
    device: str
    dtype: str
    model_type: str
    versions: Mapping[str, str] = {}
    rows: tuple[Row, ...]

    def save(self, path: Path) -> None:
        """Write the table as JSON."""
        dump(path, self.model_dump(mode="json", by_alias=True))

    @classmethod
    def load(cls, path: Path) -> OperatorTable:
        """Read a table; INPUT_MISSING, or INPUT_CONFIG where it is not one."""
        if not path.is_file():
            raise _bad(path, Code.INPUT_MISSING, "no such file")
        try:
            return cls.model_validate(read_object(path, code=Code.INPUT_CONFIG))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise _bad(path, Code.INPUT_CONFIG, f"{key}: {first['msg']}") from error


def given_table(speed: Speed | None, *, model_type: str, dtype: str) -> OperatorTable | None:
    """The table that a budget names; None where it names none.

    `dtype` is a torch name. Errors: INPUT_MISSING, INPUT_CONFIG, RECIPE_VALUE where the table is of
    another engine, family or dtype.
    """
    if speed is None or speed.table is None:
        return None
    path = Path(speed.table)
    table = OperatorTable.load(path)
    for name, found, wanted in (
        ("engine", table.engine, speed.engine),
        ("family", table.model_type, model_type),
        ("dtype", table.dtype, dtype),
    ):
        if found != wanted:
            raise _bad(path, Code.RECIPE_VALUE, f"the table's {name} is {found}, not {wanted}")
    return table


def predicted_ms(table: OperatorTable, shapes: Shapes, speed: Speed) -> FloatArray:
    """Milliseconds of one batch of requests for every shape; NaN where the table does not reach.

    One prefill of the prompt, then a decode step for each further token, each at the context that
    the steps have on average.
    """
    tokens_in, tokens_out = speed.lengths
    prefill = _step(table, shapes, "prefill", speed.batch, tokens_in)
    decode = _step(table, shapes, "decode", speed.batch, decode_context(speed))
    seconds: FloatArray = prefill + (tokens_out - 1) * decode
    return 1000 * seconds


def decode_context(speed: Speed) -> int:
    """The context of an average decode step."""
    return speed.lengths[0] + speed.lengths[1] // 2


def _step(
    table: OperatorTable, shapes: Shapes, phase: Phase, batch: int, context: int
) -> FloatArray:
    size = shapes.sizes
    layer_axes = tuple(axis for axis in size if axis not in NO_LAYER)
    at = {"batch": np.full(len(shapes), batch), "context": np.full(len(shapes), context)}
    layer = _interpolated(table.rows, "layer", phase, {a: size[a] for a in layer_axes} | at)
    ends = _interpolated(table.rows, "ends", phase, {a: size[a] for a in ENDS} | at)
    return size["layers"] * layer + ends


def _interpolated(
    rows: Sequence[Row],
    part: Part,
    phase: Phase,
    at: Mapping[str, npt.NDArray[np.int64]],
) -> FloatArray:
    """Multilinear interpolation on the grid that the rows span; NaN outside and beside gaps."""
    points = [
        ({**r.sizes, "batch": r.batch, "context": r.context}, r.seconds)
        for r in rows
        if r.part == part and r.phase == phase
    ]
    length = len(at["batch"])
    points = [(where, seconds) for where, seconds in points if set(where) == set(at)]
    if not points:
        return np.full(length, np.nan)
    axes = {axis: np.unique([where[axis] for where, _ in points]) for axis in at}
    grid = np.full([len(values) for values in axes.values()], np.nan)
    for where, seconds in points:
        place = tuple(int(np.searchsorted(axes[axis], where[axis])) for axis in axes)
        grid[place] = np.nan if seconds is None else seconds
    below: list[npt.NDArray[np.intp]] = []
    share: list[FloatArray] = []
    inside = np.ones(length, dtype=bool)
    for axis, values in axes.items():
        inside &= (at[axis] >= values[0]) & (at[axis] <= values[-1])
        lower = np.clip(np.searchsorted(values, at[axis], side="right") - 1, 0, len(values) - 1)
        upper = np.minimum(lower + 1, len(values) - 1)
        span = np.maximum(values[upper] - values[lower], 1)
        below.append(lower)
        share.append((at[axis] - values[lower]) / span)
    total = np.zeros(length)
    for corner in product((0, 1), repeat=len(axes)):
        weight = np.ones(length)
        place_of = []
        for side, lower, part_of, values in zip(corner, below, share, axes.values(), strict=True):
            weight = weight * (part_of if side else 1 - part_of)
            place_of.append(np.minimum(lower + side, len(values) - 1))
        # A corner without weight may be a gap; one with weight makes the sum NaN.
        total += np.where(weight > 0, weight * grid[tuple(place_of)], 0.0)
    return np.where(inside, total, np.nan)


def _bad(path: Path, code: Code, cause: str) -> ParetronError:
    fix = "`paretron table RECIPE` measures one"
    return ParetronError(Problem(code, cause[:200], where=str(path), fix=fix))
