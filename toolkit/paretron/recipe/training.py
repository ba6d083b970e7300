"""Training sections: pretraining, correction, distillation and its loss.

Numbers follow the papers: forward KL on logits alone, temperature 1, cosine decay.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from paretron.recipe.base import NUMBER as _NUMBER
from paretron.recipe.base import Count, Name, Positive, Rate, Section, SeqLen, Share, Tokens
from paretron.recipe.texts import TrainingText


def _plain_data(value: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"a value that JSON cannot hold: {error}") from error
    return value


class Training(Section):
    """One training run: AdamW, linear warm-up, cosine decay to a floor.

    `global_batch` counts windows a step over all ranks; `micro_batch` those of one forward pass.
    `activation_checkpointing` saves memory for a third more work. Of several processes, one that
    does not move for `stall_timeout_s` seconds ends the training.
    `tensor_parallel` of the processes hold one model together, each its share of every matrix, and
    the data is divided among such groups. `attention` is PyTorch's own (sdpa) or that of the
    package flash-attn, for bfloat16 on CUDA. `compile` turns each layer into one program for the
    device: faster steps after a start of minutes.
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
    tensor_parallel: Positive = 1
    attention: Literal["sdpa", "flash_attention_2"] = "sdpa"
    compile: bool = False
    activation_checkpointing: bool = False
    stall_timeout_s: Positive = 1800

    @property
    def shares(self) -> int:
        """Into how many shares each step's windows go."""
        return self.processes // self.tensor_parallel

    @model_validator(mode="after")
    def _flash_in_half_precision(self) -> Training:
        if self.attention == "flash_attention_2" and self.dtype != "bfloat16":
            raise ValueError(f"attention: flash_attention_2 goes with bfloat16, not {self.dtype}")
        return self

    @model_validator(mode="after")
    def _compiled_layers_are_whole(self) -> Training:
        if self.compile and self.tensor_parallel > 1:  # torch 2.13 cannot, with checkpointing
            raise ValueError("compile goes without tensor_parallel")
        return self

    @model_validator(mode="after")
    def _processes_form_groups(self) -> Training:
        if self.processes % self.tensor_parallel:
            raise ValueError(
                f"processes {self.processes} is not a multiple of tensor_parallel "
                f"{self.tensor_parallel}"
            )
        return self

    @model_validator(mode="after")
    def _batches_divide(self) -> Training:
        if self.global_batch % (self.micro_batch * self.shares):
            cut = f" / tensor_parallel {self.tensor_parallel}" if self.tensor_parallel > 1 else ""
            raise ValueError(
                f"global_batch {self.global_batch} is not a multiple of micro_batch "
                f"{self.micro_batch} x processes {self.processes}{cut}"
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
    data: TrainingText


class Lora(Section):
    """Adapters beside the matrices of every layer: W + alpha / rank * B A."""

    rank: Positive = 16
    alpha: Positive = 32


class Trial(Section):
    """A go or no-go for a correction: one student's shape distilled for a short while, twice.

    Its teacher is once the model as it is and once the corrected one, all else is equal. The
    corrected teacher goes on where the student's validation loss is lower with it. `student` left
    out is the first one that is not searched for.
    """

    tokens: Tokens
    student: Name | None = None


CORRECTED = "teacher"  # the folder below a student of the copy that was corrected along with it
# What a correction states for itself even where it is part of a distillation.
_OF_A_CORRECTION = frozenset(
    {"tokens", "lr", "min_lr", "warmup_steps", "weight_decay", "beta2", "clip"}
)


class Correct(Training):
    """Teacher correction: the unpruned teacher sees the distillation text first (paper 2).

    `what` trains all weights, those of norms alone, or `lora` adapters, which are merged into the
    matrices at the end: with the latter two, optimiser and checkpoints are small, and a larger lr
    is usual. `trial` measures whether it helps, before anything is made from it.
    In mode "parallel" students are cut from the teacher as it is, and each learns from a copy of
    it that is corrected on the same windows meanwhile, for `tokens`, then teaches as it is then.
    Both are one training: batch, precision, processes and checkpoints are those of `distill` and
    left out here. Whatever `distill.teacher` says, that copy lies in parts, as the student does.
    """

    OF_DISTILL: ClassVar = tuple(n for n in Training.model_fields if n not in _OF_A_CORRECTION)

    mode: Literal["serial", "parallel"] = "serial"
    what: Literal["all", "norms", "lora"] = "all"
    lora: Lora | None = None
    trial: Trial | None = None
    lr: Rate = 2e-5
    min_lr: Share = 2e-6
    warmup_steps: Count = 120

    @property
    def passes(self) -> int:
        """What a forward and a backward pass cost, in forward passes.

        The backward pass of weights that train costs two, of those that are frozen one.
        """
        return 3 if self.what == "all" else 2

    @model_validator(mode="after")
    def _lora_is_asked_for(self) -> Correct:
        if self.lora is not None and self.what != "lora":
            raise ValueError(f"lora goes with what: lora, not with what: {self.what}")
        return self

    @model_validator(mode="after")
    def _adapters_are_not_cut(self) -> Correct:
        if self.what == "lora" and self.tensor_parallel > 1:
            raise ValueError("what: lora goes without tensor_parallel")
        return self

    @model_validator(mode="after")
    def _a_trial_comes_after(self) -> Correct:
        if self.mode == "parallel" and self.trial is not None:
            raise ValueError("trial judges a teacher that was corrected before: mode: serial")
        return self


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
    on the text's own tokens, which is added; `logits: none` with `labels: 1.0` learns from
    them alone, as conventional retraining does. `states` left out: the embedding and the output of
    the third layer from the end are imitated when half of the layers or more go; {} for none.
    """

    logits: Literal["forward_kl", "reverse_kl", "jsd", "mse", "cosine", "wsl_kd", "none"] = (
        "forward_kl"
    )
    temperature: Annotated[float, _NUMBER, Field(gt=0, le=100)] = 1.0
    top_k: Positive | None = None
    labels: Annotated[float, _NUMBER, Field(ge=0, le=1000)] = 0.0
    states: States | None = None

    @model_validator(mode="after")
    def _top_k_of_forward_kl(self) -> Loss:
        if self.top_k is not None and self.logits != "forward_kl":
            raise ValueError(f"top_k goes with forward_kl, not with {self.logits}")
        return self

    @model_validator(mode="after")
    def _none_is_labels_alone(self) -> Loss:
        stated = self.labels, self.temperature, self.states or States()
        if self.logits == "none" and stated != (1.0, 1.0, States()):
            raise ValueError(
                "logits: none learns from the labels alone: it goes with labels: 1.0, and with no "
                "temperature and no states"
            )
        return self


class Phase(Section):
    """Part of a distillation, with windows of its own length.

    What is left out is as in `distill`, but for `lr`: a phase that states one begins a cosine there
    (to `min_lr`, without a warm-up), and one that does not goes on along the curve before it.
    """

    seq_len: SeqLen
    tokens: Tokens
    global_batch: Positive | None = None
    micro_batch: Positive | None = None
    lr: Rate | None = None
    min_lr: Share | None = None


class Distill(Training):
    """Training of every student against the teacher's logits.

    `phases` come one after the other, as 8k windows and then 32k ones, in place of `tokens` and of
    the text's seq_len. What one phase has read is not read by the next before all has been read.
    `teacher` says where its layers are: "replicated" on every device, "sharded" over all of them,
    or "offloaded" to host memory, from where each comes to the device for its turn.
    `offline` asks the teacher once about the whole text, for all students, and keeps what it says
    on disk: "top_k", the `loss.top_k` likeliest tokens (about 200 bytes a token of text at 64), or
    "hidden", its last hidden states (the exact loss, of any kind). No intermediate states then.
    """

    loss: Loss = Loss()
    offline: Literal["top_k", "hidden"] | None = None
    teacher: Literal["replicated", "sharded", "offloaded"] = "replicated"
    phases: tuple[Phase, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _tokens_of_phases(cls, value: Any) -> Any:
        phases = value.get("phases") if isinstance(value, dict) else None
        if not phases or "tokens" in value or not isinstance(phases, list | tuple):
            return value
        try:
            stated = (p.model_dump() if isinstance(p, Phase) else p for p in phases)
            return value | {"tokens": sum(phase["tokens"] for phase in stated)}
        except (TypeError, KeyError, IndexError):  # said of the phase itself
            return value | {"tokens": 1}

    @model_validator(mode="after")
    def _offline_fits(self) -> Distill:
        if self.offline is None:
            return self
        if self.loss.logits == "none":
            raise ValueError("offline goes with a loss that asks the teacher, not logits: none")
        if self.offline == "top_k" and self.loss.top_k is None:
            raise ValueError(
                "offline: top_k goes with logits: forward_kl and a top_k in loss, as 64; any other "
                "loss with offline: hidden"
            )
        if (self.loss.states or States()) != States():
            raise ValueError("offline goes without loss.states: they are not captured")
        if len({phase.seq_len for phase in self.phases}) > 1:
            raise ValueError("offline goes with phases of one seq_len")
        return self

    @model_validator(mode="after")
    def _cut_and_compiled_fit(self) -> Distill:
        states = self.loss.states or States()
        if self.compile and (states.mlp_input or states.attention):
            raise ValueError("compile goes without loss.states.mlp_input and loss.states.attention")
        if self.tensor_parallel == 1:
            return self
        if self.loss.top_k is not None:
            raise ValueError(
                "tensor_parallel goes without loss.top_k: no process has every token's logit"
            )
        if states.attention:
            raise ValueError(
                "tensor_parallel goes without loss.states.attention: no process has all heads"
            )
        if self.teacher == "offloaded":
            raise ValueError("tensor_parallel goes with teacher: replicated or sharded")
        return self

    @model_validator(mode="after")
    def _phases_fit(self) -> Distill:
        if not self.phases:
            return self
        if self.tokens != (total := sum(phase.tokens for phase in self.phases)):
            raise ValueError(f"tokens {self.tokens} are not the {total} of the phases")
        longest = max(phase.seq_len for phase in self.phases)
        for number, phase in enumerate(self.phases):
            if longest % phase.seq_len:
                raise ValueError(
                    f"phases.{number}: seq_len {phase.seq_len} does not divide the longest, "
                    f"{longest}"
                )
            batch = phase.global_batch or self.global_batch
            at_once = (phase.micro_batch or self.micro_batch) * self.shares
            if batch % at_once:
                raise ValueError(
                    f"phases.{number}: global_batch {batch} is not a multiple of micro_batch x "
                    f"processes, {at_once}"
                )
            floor = self.min_lr if phase.min_lr is None else phase.min_lr
            if phase.lr is not None and floor > phase.lr:
                raise ValueError(f"phases.{number}: min_lr {floor} is above lr {phase.lr}")
        return self
