"""What one micro-batch is trained on: the student's hidden states against teacher or labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from paretron.distill.fused import fused_cross_entropy, fused_forward_kl
from paretron.distill.losses import IGNORE


@dataclass(frozen=True)
class TeacherStates:
    """What the fused loss needs of the teacher: hidden [batch, seq, d] and lm_head [vocab, d]."""

    hidden: Tensor
    weight: Tensor


class Teacher:
    """A model that is only ever asked: eval mode, no gradients, never changed."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def states(self, input_ids: Tensor) -> TeacherStates:
        """Final hidden states of input_ids [batch, seq], and the lm_head that reads them."""
        return TeacherStates(hidden_states(self.model, input_ids), head_weight(self.model))


class Objective(nn.Module):
    """The student with its loss, one module so that parallelism has one root to wrap.

    Without teacher states the loss is cross entropy on the labels (correction, pretraining),
    with them forward KL (distillation). Dropout stays off: data and seed alone decide a training.
    """

    def __init__(self, student: PreTrainedModel, *, temperature: float = 1.0) -> None:
        super().__init__()
        self.student = student.eval().requires_grad_(True)
        self.temperature = temperature

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        teacher: TeacherStates | None,
        normaliser: float,
    ) -> Tensor:
        """Sum of the loss over valid positions, divided by `normaliser`; a scalar in fp64.

        input_ids, labels [batch, seq]; labels hold IGNORE where a position does not count.
        """
        hidden, weight = hidden_states(self.student, input_ids), head_weight(self.student)
        if teacher is None:
            return fused_cross_entropy(hidden, weight, labels, normaliser=normaliser)
        return fused_forward_kl(
            hidden,
            weight,
            teacher.hidden,
            teacher.weight,
            valid=labels != IGNORE,
            temperature=self.temperature,
            normaliser=normaliser,
        )


def hidden_states(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """The states after the final norm, [batch, seq, hidden]."""
    states: Tensor = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    return states


def head_weight(model: PreTrainedModel) -> Tensor:
    """The weight that turns final states into logits, [vocab, hidden]; tied or not."""
    weight: Tensor = model.get_output_embeddings().weight
    return weight
