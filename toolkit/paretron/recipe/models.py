"""Every section of a recipe, with its defaults: the one place where a default stands.

Numbers follow the papers: (l2, mean) aggregation, forward KL on logits alone, temperature 1,
cosine decay. Names are looked up in our own tables; nothing here is a path to code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError


def _written_as_number(value: object) -> object:
    # true is 1 to Python, and "64" is 64 to pydantic; who writes them in a recipe means neither.
    if isinstance(value, bool | str):
        raise PydanticCustomError("number", "Input should be a number")
    return value


def _plain_data(value: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"a value that JSON cannot hold: {error}") from error
    return value


_NUMBER = BeforeValidator(_written_as_number)
Positive = Annotated[int, _NUMBER, Field(gt=0, le=10**9)]
Count = Annotated[int, _NUMBER, Field(ge=0, le=10**9)]
SeqLen = Annotated[int, _NUMBER, Field(ge=2, le=10**9)]  # a token is learned from the one before it
# 2.0e9 is how people write tokens; the value must still be a whole number.
Tokens = Annotated[int, _NUMBER, Field(gt=0, le=10**15)]
Rate = Annotated[float, _NUMBER, Field(gt=0, lt=1, allow_inf_nan=False)]
Share = Annotated[float, _NUMBER, Field(ge=0, lt=1, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$")]
# A path or an id: no control characters, and no longer than a file system takes.
Place = Annotated[str, Field(min_length=1, max_length=1000, pattern=r"^[^\x00-\x1f]+$")]


class Section(BaseModel):
    """What all sections share: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TextSource(Section):
    """Where text comes from: files (.jsonl with "text", or .txt), or a corpus known by name."""

    path: Place | None = None
    corpus: Literal["stdlib"] | None = None
    part: Literal["pretrain", "train", "calibration", "validation"] | None = None

    @model_validator(mode="after")
    def _one_of(self) -> TextSource:
        if (self.path is None) == (self.corpus is None):
            raise ValueError("state exactly one of path and corpus")
        if (self.corpus is None) != (self.part is None):
            raise ValueError("part goes with corpus, and corpus needs a part")
        return self


class TokenisedSource(TextSource):
    """Text cut into windows of `seq_len` tokens; `tokens` bounds how much of it is read."""

    seq_len: SeqLen = 2048
    tokens: Tokens | None = None


class Calibration(TokenisedSource):
    """The text that importance is measured on: `samples` windows drawn by seed."""

    samples: Positive = 1024


class Data(Section):
    """The three texts of a run; they must not overlap for the numbers to mean anything."""

    calibration: Calibration
    train: TokenisedSource
    validation: TokenisedSource


class Training(Section):
    """One training run: AdamW, linear warm-up, cosine decay to a floor.

    `global_batch` counts windows a step over all ranks; `micro_batch` those of one forward pass.
    """

    tokens: Tokens
    lr: Rate = 1e-4
    min_lr: Share = 1e-5
    warmup_steps: Count = 40
    global_batch: Positive = 1152
    micro_batch: Positive = 1
    weight_decay: Share = 0.1
    beta2: Share = 0.95
    clip: Annotated[float, _NUMBER, Field(gt=0)] = 1.0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    checkpoint_every: Positive = 500
    eval_every: Positive = 100
    processes: Positive = 1

    @model_validator(mode="after")
    def _batches_divide(self) -> Training:
        if self.global_batch % (self.micro_batch * self.processes):
            raise ValueError(
                f"global_batch {self.global_batch} is not a multiple of micro_batch "
                f"{self.micro_batch} x processes {self.processes}"
            )
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is above lr {self.lr}")
        return self


class Tokenizer(Section):
    """A byte-level BPE tokenizer trained on the pretraining text."""

    vocab_size: Annotated[int, _NUMBER, Field(ge=300, le=1 << 20)]


class Pretrain(Training):
    """A teacher trained from scratch: for demonstrations and experiments."""

    config: Annotated[dict[str, Any], AfterValidator(_plain_data)]
    tokenizer: Tokenizer
    data: TokenisedSource


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


class Correct(Training):
    """Teacher correction: the unpruned teacher sees the distillation text first (paper 2)."""

    mode: Literal["serial"] = "serial"
    lr: Rate = 2e-5
    min_lr: Share = 2e-6
    warmup_steps: Count = 120


class Depth(Section):
    """How layers are ranked: by loss when removed, or by block influence."""

    metric: Literal["loss", "bi"] = "loss"
    contiguous: bool = True
    samples: Positive = 32


class Score(Section):
    """Aggregation of activations over a sample's positions, then over samples (paper 1)."""

    batch: Literal["mean", "l2", "var"] = "l2"
    sequence: Literal["mean", "l2", "var"] = "mean"
    micro_batch: Positive = 8
    depth: Depth = Depth()


class Student(Section):
    """A target shape; an axis left out keeps the teacher's size."""

    hidden: Positive | None = None
    ffn: Positive | None = None
    heads: Positive | None = None
    kv_heads: Positive | None = None
    layers: Positive | None = None

    @model_validator(mode="after")
    def _some_axis(self) -> Student:
        if not self.model_dump(exclude_none=True):
            raise ValueError("state at least one of hidden, ffn, heads, kv_heads, layers")
        return self


class Prune(Section):
    """How weights are cut: residual head merging, the dtype written, the largest shard."""

    merge_heads: bool = True
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    max_shard_gb: Annotated[float, _NUMBER, Field(gt=0, le=100)] = 5.0


class Loss(Section):
    """What the student learns from: forward KL(teacher || student) over the whole vocabulary."""

    logits: Literal["forward_kl"] = "forward_kl"
    temperature: Annotated[float, _NUMBER, Field(gt=0, le=100)] = 1.0


class Distill(Training):
    """Training of every student against the teacher's logits."""

    loss: Loss = Loss()


class Evaluate(Section):
    """Held-out texts, by their name in `data`."""

    perplexity: tuple[Literal["validation", "train", "calibration"], ...] = ("validation",)
    micro_batch: Positive = 8


class Export(Section):
    """One export of every student; `to` names an installed exporter."""

    to: Name
    dtype: Literal["float32", "bfloat16", "float16"] | None = None


class Engine(Section):
    """A serving engine; `python` names the interpreter of one that has its own environment."""

    name: Name
    python: Path | None = None
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
