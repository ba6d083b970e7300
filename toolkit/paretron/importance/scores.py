"""The scores file: sums in scores.safetensors, what they mean in scores.json.

Everything a selection needs follows from it without the model: all nine aggregations of every
width axis, the values of another criterion beside them, the influence of every layer and block, the
loss without them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import load_file, save_file

from paretron.artifacts.headers import read_header
from paretron.artifacts.jsonfile import dump, read_object
from paretron.errors import Code, ParetronError, Problem
from paretron.importance.statistics import Aggregation, AxisStatistics, aggregate
from paretron.recipe.scoring import Depth

SCORES_TENSORS = "scores.safetensors"
SCORES_JSON = "scores.json"
_CRITERION = "criterion"  # the part of a tensor's name after its axis


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ScoredAxis(_Strict):
    """One width axis: where it was observed, in the order of its sums, and its units per tap."""

    taps: tuple[str, ...]
    units: int


class DepthLosses(_Strict):
    """Loss without layers, in nats, on `samples` windows.

    `blocks[n][i]`: without the n layers from the i-th on; `greedy`: (layer, loss) in the order of
    removal one by one, empty when only blocks were asked for.
    """

    samples: int
    baseline: float
    blocks: Mapping[int, tuple[float, ...]]
    greedy: tuple[tuple[int, float], ...] = ()


class DepthAccuracies(DepthLosses):
    """A task's accuracy without layers, from 0 to 1, on `samples` documents."""

    task: str


Criterion = Literal["activation", "random", "magnitude", "taylor", "fluctuation"]
_OF_GROUPS = ("magnitude", "taylor")  # criteria by which a KV group is more than its query heads


class ScoresInfo(_Strict):
    """scores.json. `influence[n][i]` is 1 - E[cos] over the block of n layers from the i-th on.

    `angular[n][i]` is the mean angle over the same block, in parts of pi. `criterion` is what units
    are ranked by; `layer_values[metric][i]` is what layer i is worth by a metric that gives every
    layer a value of its own.
    """

    schema_: Literal[1] = Field(default=1, alias="schema")
    model_type: str
    sizes: Mapping[str, int]
    model_identity: str | None  # of the scored model's manifest, where it has one
    samples: int
    tokens: int
    seq_len: int
    seed: int
    axes: Mapping[str, ScoredAxis]
    influence: Mapping[int, tuple[float, ...]]
    angular: Mapping[int, tuple[float, ...]] = Field(default_factory=dict)
    losses: DepthLosses | None = None
    accuracies: DepthAccuracies | None = None
    criterion: Criterion = "activation"
    layer_values: Mapping[str, tuple[float, ...]] = Field(default_factory=dict)

    def depth(self) -> Depth:
        """How these scores rank layers, where nobody says otherwise: by what was measured."""
        if (measured := self.losses or self.accuracies) is not None:
            task = measured.task if isinstance(measured, DepthAccuracies) else None
            metric: Literal["task", "loss"] = "task" if task else "loss"
            return Depth(metric=metric, task=task, contiguous=not measured.greedy)
        for known in ("random", "magnitude", "taylor"):
            if known in self.layer_values:
                return Depth.model_validate({"metric": known})
        return Depth(metric="bi")

    def criterion_shapes(self) -> dict[str, tuple[int, int]]:
        """The [places, units] of every axis that a criterion besides `activation` values."""
        if self.criterion == "activation":
            return {}
        shapes = {axis: (len(a.taps), a.units) for axis, a in self.axes.items()}
        shapes["hidden"] = (1, self.sizes["hidden"])
        if self.criterion in _OF_GROUPS:
            shapes["kv_heads"] = (self.sizes["layers"], self.sizes["kv_heads"])
        return shapes


@dataclass(frozen=True)
class Scores:
    """Importance of everything in one model; `statistics` has the axes of `info.axes`.

    `units` are the values of a criterion besides `activation`, fp64 [places, units] by axis.
    """

    info: ScoresInfo
    statistics: Mapping[str, AxisStatistics]
    units: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write both files into an existing folder."""
        tensors: dict[str, torch.Tensor] = {}
        for axis, s in self.statistics.items():
            tensors |= {f"{axis}.sums": s.sums, f"{axis}.squares": s.squares}
        tensors |= {f"{axis}.{_CRITERION}": values for axis, values in self.units.items()}
        save_file(tensors, folder / SCORES_TENSORS)
        dump(folder / SCORES_JSON, self.info.model_dump(mode="json", by_alias=True))

    @classmethod
    def load(cls, folder: Path) -> Scores:
        """Read and check a scores folder.

        Errors: INPUT_MISSING, INPUT_CONFIG (scores.json is not what this version writes),
        INPUT_HEADER, INPUT_SHAPE, INPUT_NONFINITE.
        """
        for name in (SCORES_JSON, SCORES_TENSORS):
            if not (folder / name).is_file():
                raise ParetronError(
                    Problem(
                        Code.INPUT_MISSING,
                        f"no {name} here",
                        where=str(folder),
                        fix="name a folder that `paretron score` wrote",
                    )
                )
        info = _read_info(folder / SCORES_JSON)
        shapes = {n: e.shape for n, e in read_header(folder / SCORES_TENSORS).items()}
        expected = {
            f"{axis}.{part}": (len(a.taps), 3, a.units)
            for axis, a in info.axes.items()
            for part in ("sums", "squares")
        } | {f"{axis}.{_CRITERION}": s for axis, s in info.criterion_shapes().items()}
        if shapes != expected:
            raise _bad(folder / SCORES_TENSORS, Code.INPUT_SHAPE, "does not fit scores.json")
        tensors = load_file(folder / SCORES_TENSORS)
        for name, tensor in tensors.items():
            if tensor.dtype != torch.float64 or not torch.isfinite(tensor).all():
                raise _bad(
                    folder / SCORES_TENSORS, Code.INPUT_NONFINITE, f"{name} is not all finite fp64"
                )
        statistics = {
            axis: AxisStatistics(info.samples, tensors[f"{axis}.sums"], tensors[f"{axis}.squares"])
            for axis in info.axes
        }
        units = {axis: tensors[f"{axis}.{_CRITERION}"] for axis in info.criterion_shapes()}
        return cls(info, statistics, units)

    def values(
        self, axis: str, layer: int | None = None, *, batch: Aggregation, sequence: Aggregation
    ) -> torch.Tensor:
        """Scores of the units of an axis by the file's criterion, fp64 [units].

        Axes: "ffn", "experts", "heads" and "kv_heads" in one layer; "moe_ffn" in one layer too,
        [experts, units]; "hidden" over the whole model, for activations all norms of all layers,
        with no layer stated. A KV group counts as the sum of its query heads, but by magnitude and
        taylor as all of its own weights. `batch` and `sequence` aggregate activations alone.
        """
        if axis == "hidden":
            return self.places(axis, batch=batch, sequence=sequence).sum(0)
        if layer is None:
            raise ValueError(f"{axis} is ranked inside a layer: state which")
        if axis == "kv_heads" and axis in self.units:
            return self.units[axis][layer]
        if axis == "kv_heads":
            heads = self.values("heads", layer, batch=batch, sequence=sequence)
            return heads.view(self.info.sizes["kv_heads"], -1).sum(1)
        found = self.places(axis, self._taps(axis, layer), batch=batch, sequence=sequence)
        return found if axis == "moe_ffn" else found[0]

    def places(
        self,
        axis: str,
        which: list[int] | None = None,
        *,
        batch: Aggregation,
        sequence: Aggregation,
    ) -> torch.Tensor:
        """Scores of an axis where it was observed, there or everywhere, fp64 [places, units]."""
        if self.info.criterion != "activation":
            values = self.units[axis]
            return values if which is None else values[which]
        statistics = self.statistics[axis]
        some = statistics if which is None else statistics.of(which)
        return aggregate(some, batch=batch, sequence=sequence)

    def observed(self, axis: str, layer: int | None = None) -> bool:
        """Whether the axis has scores there: experts, for one, need not be in every layer."""
        where = "heads" if axis == "kv_heads" else axis
        return where in self.info.axes and (layer is None or bool(self._taps(where, layer)))

    def _taps(self, axis: str, layer: int) -> list[int]:
        """The places of an axis' sums that were observed in a layer, by their modules' names."""
        return [
            k
            for k, name in enumerate(self.info.axes[axis].taps)
            if f".layers.{layer}." in f".{name}."
        ]

    def ranking(
        self, axis: str, layer: int | None = None, *, batch: Aggregation, sequence: Aggregation
    ) -> torch.Tensor:
        """The units of an axis from the most to the least important; equals by lower number."""
        return rank(self.values(axis, layer, batch=batch, sequence=sequence))


def rank(values: torch.Tensor) -> torch.Tensor:
    """Indices from the highest to the lowest value; equal values by lower index."""
    return torch.argsort(values, dim=-1, descending=True, stable=True)


def _read_info(path: Path) -> ScoresInfo:
    raw = read_object(path, code=Code.INPUT_CONFIG)
    try:
        return ScoresInfo.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise _bad(path, Code.INPUT_CONFIG, f"{key}: {first['msg']}") from error


def _bad(path: Path, code: Code, cause: str) -> ParetronError:
    return ParetronError(
        Problem(code, cause[:200], where=str(path), fix="run `paretron score` again")
    )
