"""A student: its target shape, how its weights are cut, how it starts closer to its teacher."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictBool, model_validator

from paretron.recipe.base import NUMBER as _NUMBER
from paretron.recipe.base import Positive, Section
from paretron.recipe.searching import Search

AXES = ("hidden", "ffn", "heads", "kv_heads", "layers", "experts", "moe_ffn")  # of a student


class Student(Section):
    """A target shape; an axis left out keeps the teacher's size. Or a search that finds one."""

    hidden: Positive | None = None
    ffn: Positive | None = None
    heads: Positive | None = None
    kv_heads: Positive | None = None
    layers: Positive | None = None
    experts: Positive | None = None
    moe_ffn: Positive | None = None
    search: Search | None = None

    @model_validator(mode="after")
    def _some_axis(self) -> Student:
        stated = self.axes()
        if self.search is None and not stated:
            raise ValueError(f"state at least one of {', '.join(AXES)}")
        if self.search is not None and stated:
            raise ValueError(f"search finds the shape: leave out {', '.join(stated)}")
        return self

    def axes(self) -> dict[str, int]:
        """The target size of every axis that is stated."""
        return self.model_dump(exclude={"search"}, exclude_none=True)

    def layer_counts(self) -> tuple[int, ...]:
        """The numbers of layers that it may have; none where depth stays."""
        if self.search is not None:
            layers = self.search.space.layers
            return layers.sizes() if layers is not None else ()
        return (self.layers,) if self.layers is not None else ()


class Prune(Section):
    """How weights are cut: residual head merging, the dtype written, the largest shard.

    "auto" merges heads as in paper 1, but not where matrices are refitted, which merging harms.
    Removed `layers` are dropped, or merged into the layer before them (LaCo); a refit then starts
    from the merged weights.
    """

    merge_heads: StrictBool | Literal["auto"] = "auto"
    layers: Literal["drop", "merge"] = "drop"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    max_shard_gb: Annotated[float, _NUMBER, Field(gt=0, le=100)] = 5.0


class Compensate(Section):
    """What brings a pruned student closer to its teacher before any training.

    `rotate` prunes `hidden` along the principal components of the residual stream instead of its
    channels; `refit` fits matrices to what the teacher's layers make, by ridge regression on
    `samples` windows of the calibration text, `ridge` in units of the mean square of what a matrix
    reads. "auto" does what is exact (rotate) or possible (refit) for the family; refit "mean" only
    keeps the mean of what a matrix writes (FLAP's compensation, without its biases); with both
    false a student is trimmed as in the papers. `spread` turns the kept directions so that outliers
    spread over all channels, for quantised exports. `by_axis` also measures what each pruned axis
    costs alone, with and without; it takes as long again for each.
    """

    rotate: StrictBool | Literal["auto"] = "auto"
    refit: StrictBool | Literal["auto", "mean"] = "auto"
    ridge: Annotated[float, _NUMBER, Field(gt=0, le=100)] = 0.01
    spread: bool = False
    by_axis: bool = False
    samples: Positive = 256

    @model_validator(mode="after")
    def _something_to_measure(self) -> Compensate:
        if self.by_axis and not (self.rotate or self.refit):
            raise ValueError("by_axis compares with compensation: rotate and refit are both off")
        return self
