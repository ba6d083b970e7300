"""The whole recipe and its smaller sections; every default of a recipe stands in this package.

Names are looked up in our own tables; nothing here is a path to code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from paretron.recipe.base import NAMEABLE, Count, Name, Place, Positive, Section
from paretron.recipe.base import NUMBER as _NUMBER
from paretron.recipe.scoring import Score
from paretron.recipe.students import Compensate, Prune, Student
from paretron.recipe.texts import Data
from paretron.recipe.training import Correct, Distill, Pretrain


class Teacher(Section):
    """The model to make smaller: a local folder or hub id, or one to pretrain first."""

    model: Place | None = None
    revision: Place = "main"
    pretrain: Pretrain | None = None

    @model_validator(mode="after")
    def _one_of(self) -> Teacher:
        if (self.model is None) == (self.pretrain is None):
            raise ValueError("state exactly one of model and pretrain")
        return self


class Evaluate(Section):
    """Held-out texts, by their name in `data`."""

    perplexity: tuple[Literal["validation", "train", "calibration"], ...] = ("validation",)
    micro_batch: Positive = 8


class Export(Section):
    """One export of every student; `to` names an installed exporter, which knows its formats."""

    to: Name
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    quantize: Name | None = None

    @model_validator(mode="after")
    def _one_format(self) -> Export:
        if self.dtype is not None and self.quantize is not None:
            raise ValueError("state dtype or quantize, not both")
        return self


class Engine(Section):
    """A serving engine; `python` names the interpreter of one that has its own environment."""

    name: Name
    python: Annotated[Path, NAMEABLE] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None


class Profile(Section):
    """What is measured: every engine at every batch and (input, output) length."""

    engines: tuple[Engine, ...]
    batches: tuple[Positive, ...] = (1,)
    lengths: tuple[tuple[Positive, Annotated[int, _NUMBER, Field(ge=2)]], ...] = ((128, 128),)
    repeats: Positive = 3
    warmup: Count = 1


class Recipe(Section):
    """A whole job: teacher in, measured students out."""

    schema_: Annotated[Literal[1], Field(alias="schema")]
    teacher: Teacher
    data: Data
    correct: Correct | None = None
    score: Score = Score()
    students: Annotated[dict[Name, Student], Field(min_length=1)]
    prune: Prune = Prune()
    compensate: Compensate = Compensate()
    distill: Distill
    evaluate: Evaluate = Evaluate()
    export: tuple[Export, ...] = (Export(to="hf"),)
    profile: Profile | None = None
    seed: Annotated[int, _NUMBER, Field(ge=0, lt=2**31)] = 0

    @model_validator(mode="after")
    def _teacher_is_no_student(self) -> Recipe:
        if "teacher" in self.students:
            raise ValueError("a student cannot be named teacher")
        return self

    @model_validator(mode="after")
    def _one_axis_alone_is_ranked_once(self) -> Recipe:
        if self.compensate.by_axis and self.score.rounds > 1:
            raise ValueError("compensate.by_axis goes by one scoring: score.rounds must be 1")
        return self

    @model_validator(mode="after")
    def _a_search_ranks_by_cutting_once(self) -> Recipe:
        searched = [name for name, student in self.students.items() if student.search]
        if not searched:
            return self
        if self.score.rounds > 1:
            raise ValueError(f"students.{searched[0]} is searched for: score.rounds must be 1")
        if self.prune.layers == "merge":
            raise ValueError(f"students.{searched[0]} is searched for: prune.layers must be drop")
        return self
