"""Training sections: pretraining, correction, distillation and its loss.

Numbers follow the papers: forward KL on logits alone, temperature 1, cosine decay.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from paretron.recipe.base import NUMBER as _NUMBER
from paretron.recipe.base import Count, Positive, Rate, Section, Share, Tokens
from paretron.recipe.texts import TokenisedSource


def _plain_data(value: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"a value that JSON cannot hold: {error}") from error
    return value


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


class Correct(Training):
    """Teacher correction: the unpruned teacher sees the distillation text first (paper 2)."""

    mode: Literal["serial"] = "serial"
    lr: Rate = 2e-5
    min_lr: Share = 2e-6
    warmup_steps: Count = 120


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
