"""The search section of a student: which shapes to try, what they may cost, how they compete."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from paretron.recipe.base import NUMBER, Count, Name, Place, Positive, Section, SeqLen, Tokens

# JSON numbers of a cost: parameters and bytes in the billions, milliseconds below one.
Amount = Annotated[float, NUMBER, Field(gt=0, le=1e18, allow_inf_nan=False)]


def _list_means_values(value: object) -> object:
    return {"values": value} if isinstance(value, list | tuple) else value


class Choice(Section):
    """Sizes of one axis: a list, or every multiple of `multiple` between `from` and `to`.

    `times_hidden` are factors of the hidden size, for the MLP only (paper 1, table 12).
    """

    values: Annotated[tuple[Positive, ...] | None, Field(min_length=1)] = None
    from_: Annotated[Positive | None, Field(alias="from")] = None
    to: Positive | None = None
    multiple: Positive | None = None
    times_hidden: Annotated[tuple[Amount, ...] | None, Field(min_length=1)] = None

    @model_validator(mode="after")
    def _one_of(self) -> Choice:
        ranged = self.from_ is not None and self.to is not None
        if (self.values is not None) + ranged + (self.times_hidden is not None) != 1:
            raise ValueError("state a list, or from and to, or times_hidden")
        if not ranged and (self.from_ or self.to or self.multiple):
            raise ValueError("from, to and multiple go together")
        if ranged and not self.sizes():
            raise ValueError(f"no multiple of {self.multiple} from {self.from_} to {self.to}")
        return self

    def sizes(self) -> tuple[int, ...]:
        """Every size once, ascending; none where they follow the hidden size."""
        if self.values is not None:
            return tuple(sorted(set(self.values)))
        if self.from_ is None or self.to is None:
            return ()
        step = self.multiple or 1
        first = -(-self.from_ // step) * step
        return tuple(range(first, self.to + 1, step))


_Axis = Annotated[Choice | None, BeforeValidator(_list_means_values)]


class Space(Section):
    """The sizes to try on each axis of a student; an axis left out keeps the teacher's size."""

    hidden: _Axis = None
    ffn: _Axis = None
    heads: _Axis = None
    kv_heads: _Axis = None
    layers: _Axis = None
    experts: _Axis = None
    moe_ffn: _Axis = None

    @model_validator(mode="after")
    def _some_axis(self) -> Space:
        chosen = self.axes()
        if not chosen:
            raise ValueError(f"state at least one of {', '.join(type(self).model_fields)}")
        if any(choice.times_hidden for axis, choice in chosen.items() if axis != "ffn"):
            raise ValueError("times_hidden is for ffn")
        return self

    def axes(self) -> dict[str, Choice]:
        """The axes that are searched."""
        stated = {axis: getattr(self, axis) for axis in type(self).model_fields}
        return {axis: choice for axis, choice in stated.items() if choice is not None}


def _limit(value: object) -> object:
    if isinstance(value, list | tuple) and len(value) == 2:
        return {"at_least": value[0], "at_most": value[1]}
    return {"at_most": value} if isinstance(value, int | float) else value


class Limit(Section):
    """The most that something may cost, and the least where that is stated (`[least, most]`)."""

    at_least: Amount | None = None
    at_most: Amount

    @model_validator(mode="after")
    def _in_order(self) -> Limit:
        if self.at_least is not None and self.at_least > self.at_most:
            raise ValueError(f"{self.at_least:g} is above {self.at_most:g}")
        return self


_Limit = Annotated[Limit, BeforeValidator(_limit)]


class Memory(Section):
    """Bytes of weights, and of keys and values at a batch and a context, in the student's dtype."""

    bytes: _Limit
    batch: Positive = 1
    context: Count = 0


class Flops(Section):
    """FLOPs of one token's forward pass inside a window of `context` tokens."""

    per_token: _Limit
    context: Count = 0


class Speed(Section):
    """Predicted time of one batch of requests on an engine, from its operator table.

    `lengths` are tokens in and out. Without a `table` the shapes are timed on this machine through
    transformers; `paretron table` measures one on any engine, and writes it where `table` says.
    """

    engine: Name = "transformers"
    table: Place | None = None
    batch: Positive = 1
    lengths: tuple[SeqLen, SeqLen] = (128, 32)
    ms: Amount | None = None
    tokens_s: Amount | None = None
    repeats: Positive = 5

    @model_validator(mode="after")
    def _one_of(self) -> Speed:
        if (self.ms is None) == (self.tokens_s is None):
            raise ValueError("state exactly one of ms (at most) and tokens_s (at least)")
        if self.table is None and self.engine != "transformers":
            raise ValueError(f"name a table of {self.engine}; `paretron table` measures one there")
        return self


class Budget(Section):
    """What a student may cost; every measure that is stated must hold."""

    params: _Limit | None = None
    non_embedding_params: _Limit | None = None
    active_params: _Limit | None = None
    memory: Memory | None = None
    flops: Flops | None = None
    speed: Speed | None = None

    @model_validator(mode="after")
    def _some_measure(self) -> Budget:
        if not self.model_dump(exclude_none=True):
            raise ValueError(f"state at least one of {', '.join(type(self).model_fields)}")
        return self


class Search(Section):
    """Find a student's shape: enumerate, rank without training, train the best ones shortly.

    For each combination of the other axes only the widest `widest` within the budget is tried.
    All candidates are ranked by their loss right after pruning, rotated as `compensate` says but
    not refitted, on `samples` windows of the validation text; the `keep` best are distilled on
    `rounds[0]` tokens, the better half of them anew on `rounds[1]`, and so on. Without rounds the
    ranking decides. The best are those of the lowest loss; where the budget states a range
    (`[least, most]`), those of the Pareto fronts of loss against what has a range.
    """

    space: Space
    budget: Budget
    widest: bool = True
    max_candidates: Positive = 1000
    samples: Positive = 32
    micro_batch: Positive = 8
    keep: Positive = 4
    rounds: tuple[Tokens, ...]

    @model_validator(mode="after")
    def _rounds_grow(self) -> Search:
        if list(self.rounds) != sorted(self.rounds):
            raise ValueError("rounds of growing numbers of tokens")
        return self
