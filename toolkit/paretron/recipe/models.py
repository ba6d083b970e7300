"""Every section of a recipe, with its defaults: the one place where a default stands.

Numbers follow the papers: (l2, mean) aggregation, forward KL on logits alone, temperature 1,
cosine decay. Names are looked up in our own tables; nothing here is a path to code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StrictBool, model_validator

from paretron.recipe.base import (
    NAMEABLE,
    Count,
    Name,
    Place,
    Positive,
    Rate,
    Section,
    SeqLen,
    Share,
    Tokens,
)
from paretron.recipe.base import NUMBER as _NUMBER
from paretron.recipe.searching import Search


def _plain_data(value: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"a value that JSON cannot hold: {error}") from error
    return value


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
    """How layers are ranked: by loss or a task's accuracy when removed, or by what they change.

    `task` names a multiple-choice task of lm-eval, or a YAML file of one. `samples` are windows of
    text, or the task's documents.
    """

    metric: Literal["loss", "bi", "angular", "task"] = "loss"
    task: Place | None = None
    contiguous: bool = True
    samples: Positive = 32

    @model_validator(mode="after")
    def _task_goes_with_its_metric(self) -> Depth:
        if (self.task is not None) != (self.metric == "task"):
            raise ValueError("metric: task needs a task, and a task needs metric: task")
        return self

    @property
    def task_file(self) -> Path | None:
        """The file of a task of one's own; None for a task that lm-eval knows by name."""
        own = self.task is not None and self.task.endswith((".yaml", ".yml"))
        return Path(str(self.task)) if own else None


class Score(Section):
    """Aggregation of activations over a sample's positions, then over samples (paper 1).

    `placement`: the whole model in memory, or one layer at a time; the scores are the same.
    `documents`: a window over several is one sample, or each of its documents is one of its own,
    which sees nothing of the others.
    """

    batch: Literal["mean", "l2", "var"] = "l2"
    sequence: Literal["mean", "l2", "var"] = "mean"
    micro_batch: Positive = 8
    documents: Literal["joined", "apart"] = "joined"
    placement: Literal["auto", "resident", "streamed"] = "auto"
    processes: Positive = 1
    depth: Depth = Depth()


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

    "auto" merges as in paper 1, but not where matrices are refitted, which merging harms.
    """

    merge_heads: StrictBool | Literal["auto"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    max_shard_gb: Annotated[float, _NUMBER, Field(gt=0, le=100)] = 5.0


LayerPair = tuple[Count, Count]  # a teacher's layer and the student's that imitates it


class States(Section):
    """Intermediate states to imitate, by pairs of layers [teacher's, student's] (paper 1).

    `output` of a block, `mlp_input`, and `attention` relations of query, key and value (MiniLMv2).
    `alpha` weighs their loss; "dynamic" makes it as large as the logits' was in the step before.
    """

    embedding: bool = False
    output: tuple[LayerPair, ...] = ()
    mlp_input: tuple[LayerPair, ...] = ()
    attention: tuple[LayerPair, ...] = ()
    distance: Literal["cosine", "mse"] = "cosine"
    alpha: Literal["dynamic"] | Annotated[float, Field(gt=0, le=10**6, strict=True)] = "dynamic"


class Compensate(Section):
    """What brings a pruned student closer to its teacher before any training.

    `rotate` prunes `hidden` along the principal components of the residual stream instead of its
    channels; `refit` fits matrices to what the teacher's layers make, by ridge regression on
    `samples` windows of the calibration text, `ridge` in units of the mean square of what a matrix
    reads. "auto" does what is exact (rotate) or possible (refit) for the family; with both false a
    student is trimmed as in the papers. `spread` turns the kept directions so that outliers spread
    over all channels, for quantised exports.
    """

    rotate: StrictBool | Literal["auto"] = "auto"
    refit: StrictBool | Literal["auto"] = "auto"
    ridge: Annotated[float, _NUMBER, Field(gt=0, le=100)] = 0.01
    spread: bool = False
    samples: Positive = 256


class Loss(Section):
    """What the student learns from: forward KL(teacher || student) over the whole vocabulary.

    `top_k` compares the teacher's k likeliest tokens and the rest as one; `labels` weighs the loss
    on the text's own tokens, which is added. `states` left out: the embedding and the output of the
    third layer from the end are imitated when half of the layers or more go; {} for none.
    """

    logits: Literal["forward_kl", "reverse_kl", "jsd", "mse", "cosine", "wsl_kd"] = "forward_kl"
    temperature: Annotated[float, _NUMBER, Field(gt=0, le=100)] = 1.0
    top_k: Positive | None = None
    labels: Annotated[float, _NUMBER, Field(ge=0, le=1000)] = 0.0
    states: States | None = None

    @model_validator(mode="after")
    def _top_k_of_forward_kl(self) -> Loss:
        if self.top_k is not None and self.logits != "forward_kl":
            raise ValueError(f"top_k goes with forward_kl, not with {self.logits}")
        return self


class Distill(Training):
    """Training of every student against the teacher's logits."""

    loss: Loss = Loss()


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
