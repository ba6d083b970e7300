"""The whole recipe and its smaller sections; every default of a recipe stands in this package.

Names are looked up in our own tables; nothing here is a path to code.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from paretron.recipe.base import NUMBER as _NUMBER
from paretron.recipe.base import Name, Place, Positive, Section, SeqLen
from paretron.recipe.evaluating import Evaluate
from paretron.recipe.goals import Goals, unmeasured
from paretron.recipe.profiling import Profile
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


class Serving(Section):
    """Limits that a server is started with; a `max_seq_len` left out is the model's own."""

    max_batch_size: Positive = 64
    max_num_tokens: Positive = 8192
    max_seq_len: SeqLen | None = None
    gpu_memory: Annotated[float, _NUMBER, Field(gt=0, le=1)] = 0.9


class Export(Section):
    """One export of every student; `to` names an installed exporter, which knows what it takes.

    `quantize` names a form of fewer bits, calibrated on the recipe's calibration text where that
    needs one. `backend` is the engine of a Triton model repository, `device` that of an ONNX
    graph. `shard_bytes` bounds a safetensors file. `tensor_parallel` and `pipeline_parallel` count
    the devices that a model is laid out for, `serving` is what its server is started with. `build`
    insists on an engine whose builder need not be installed.
    """

    to: Name
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    quantize: Name | None = None
    backend: Name | None = None
    device: Literal["cpu", "cuda"] | None = None
    shard_bytes: Positive | None = None
    tensor_parallel: Positive = 1
    pipeline_parallel: Positive = 1
    serving: Serving = Serving()
    build: bool = False

    @property
    def label(self) -> str:
        """What tells it from the other exports of a recipe, e.g. hf, hf-fp8 or triton-vllm."""
        parts = [self.to, self.quantize, self.backend, "cuda" if self.device == "cuda" else None]
        if self.tensor_parallel > 1:
            parts.append(f"tp{self.tensor_parallel}")
        if self.pipeline_parallel > 1:
            parts.append(f"pp{self.pipeline_parallel}")
        return "-".join(part for part in parts if part)

    @model_validator(mode="after")
    def _one_format(self) -> Export:
        if self.dtype is not None and self.quantize is not None:
            raise ValueError("state dtype or quantize, not both")
        return self


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
    goals: Goals = Field(default_factory=dict)
    seed: Annotated[int, _NUMBER, Field(ge=0, lt=2**31)] = 0

    @property
    def serial_correction(self) -> Correct | None:
        """That of a teacher before anything is made from it."""
        return self.correct if self.correct and self.correct.mode == "serial" else None

    @property
    def parallel_correction(self) -> Correct | None:
        """That of each student's own copy of the teacher, while the student learns from it."""
        return self.correct if self.correct and self.correct.mode == "parallel" else None

    @model_validator(mode="before")
    @classmethod
    def _work_is_divided_alike(cls, value: Any) -> Any:
        """What a parallel correction leaves out is as in `distill`."""
        correct, distill = (
            value.get(name) if isinstance(value, dict) else None for name in ("correct", "distill")
        )
        if not isinstance(correct, dict) or not isinstance(distill, dict):
            return value
        if correct.get("mode") != "parallel":
            return value
        stated = {name: distill[name] for name in Correct.OF_DISTILL if name in distill}
        return value | {"correct": stated | correct}

    @model_validator(mode="after")
    def _corrected_while_it_teaches(self) -> Recipe:
        correct, distill = self.parallel_correction, self.distill
        if correct is None:
            return self
        for name in Correct.OF_DISTILL:
            if (own := getattr(correct, name)) != (given := getattr(distill, name)):
                raise ValueError(
                    f"correct.{name} {own} is not the {given} of distill: in mode parallel both "
                    "are one training; leave it out of correct"
                )
        if correct.tokens > distill.tokens:
            raise ValueError(
                f"correct.tokens {correct.tokens} are more than the {distill.tokens} of distill: "
                "in mode parallel the teacher sees what the student sees"
            )
        if distill.offline is not None:
            raise ValueError(
                "correct.mode parallel changes the teacher while it is asked: not with "
                "distill.offline"
            )
        if distill.loss.logits == "none":
            raise ValueError(
                "correct.mode parallel corrects a teacher that distill.loss.logits: none never asks"
            )
        if distill.tensor_parallel > 1:
            raise ValueError("correct.mode parallel was not tried with distill.tensor_parallel")
        if distill.teacher == "offloaded":
            raise ValueError(
                "correct.mode parallel trains the teacher on the device: not with "
                "distill.teacher: offloaded"
            )
        return self

    @model_validator(mode="after")
    def _teacher_is_no_student(self) -> Recipe:
        if "teacher" in self.students:
            raise ValueError("a student cannot be named teacher")
        return self

    @model_validator(mode="after")
    def _goals_are_measured(self) -> Recipe:
        if wrong := list(unmeasured(self.goals, profile=self.profile, evaluate=self.evaluate)):
            raise ValueError("; ".join(f"goals.{reason}" for reason in wrong))
        return self

    @model_validator(mode="after")
    def _a_stride_leaves_context(self) -> Recipe:
        stride = self.evaluate.stride
        for name in self.evaluate.perplexity:
            seq_len = getattr(self.data, name).seq_len
            if stride is not None and stride >= seq_len:
                raise ValueError(
                    f"evaluate.stride {stride} leaves a window of {seq_len} tokens, "
                    f"data.{name}.seq_len, nothing to read before: at most {seq_len - 1}"
                )
        return self

    @model_validator(mode="after")
    def _a_trial_has_a_student(self) -> Recipe:
        trial = self.correct.trial if self.correct else None
        if trial is None:
            return self
        stated = [name for name, student in self.students.items() if student.search is None]
        if not stated:
            raise ValueError("correct.trial needs a student whose shape is stated, not searched")
        if trial.student not in (None, *stated):
            raise ValueError(
                f"correct.trial.student {trial.student} is no student of a stated shape: "
                f"{', '.join(stated)}"
            )
        if "trial" in self.students:
            raise ValueError("with correct.trial a student cannot be named trial")
        if self.distill.loss.logits == "none":
            raise ValueError("correct.trial compares teachers, distill.loss.logits: none asks none")
        return self

    @model_validator(mode="after")
    def _exports_differ(self) -> Recipe:
        labels = [export.label for export in self.export]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"two exports are {twice[0]}: they would have one name")
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
