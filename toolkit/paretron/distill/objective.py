"""What one micro-batch is trained on: the student's logits against a teacher's, or the labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from paretron.distill.batches import Batch
from paretron.distill.divergences import Divergence, ForwardKL
from paretron.distill.fused import DeferredLogits, fused_cross_entropy, fused_divergence
from paretron.distill.losses import IGNORE
from paretron.distill.states import Place, StatesLoss, capturing
from paretron.distill.tensor_parallel import own_rows
from paretron.distill.top import TopTokens
from paretron.families import family_of, logit_rule

_FORWARD_KL = ForwardKL()


@dataclass(frozen=True)
class Prediction:
    """What a model says of a batch: its logits, not made yet, and the states asked for.

    Of a captured teacher, there may be its likeliest tokens alone.
    """

    logits: DeferredLogits | TopTokens
    states: Mapping[Place, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Computed(Prediction):
    """That of a model in memory."""

    logits: DeferredLogits


class Teaches(Protocol):
    """What a student can learn from: a teacher in memory, or what one has said before."""

    @property
    def places(self) -> tuple[Place, ...]:
        """The states that come with each prediction."""

    def predict(self, batch: Batch) -> Prediction:
        """Its prediction for a batch on the device of the training."""


class Teacher:
    """A model that is only ever asked: eval mode, no gradients, never changed."""

    def __init__(self, model: PreTrainedModel, places: tuple[Place, ...] = ()) -> None:
        self.model = model.eval().requires_grad_(False)
        self.places = places

    @torch.no_grad()
    def predict(self, batch: Batch) -> Computed:
        """Its prediction for a batch on its own device."""
        return predict(self.model, batch, self.places)


class Objective(nn.Module):
    """The student with its loss, one module so that parallelism has one root to wrap.

    Without a teacher's prediction the loss is cross entropy on the labels (correction,
    pretraining), with it the divergence, and where asked for the distance of intermediate states.
    Dropout stays off: data and seed alone decide a training.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        *,
        divergence: Divergence = _FORWARD_KL,
        states: StatesLoss | None = None,
    ) -> None:
        super().__init__()
        self.student = student.eval().requires_grad_(True)
        self.divergence = divergence
        self.states = states

    def forward(
        self,
        batch: Batch,
        teacher: Prediction | None,
        normaliser: float,
        alpha: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """The loss and, of it, the part of intermediate states before `alpha` weighs it.

        Both are sums over valid positions, divided by `normaliser`; scalars in fp64.
        """
        places = self.states.student_places if self.states and teacher else ()
        own = predict(self.student, batch, places)
        none = torch.zeros((), dtype=torch.float64, device=batch.labels.device)
        if teacher is None:
            return fused_cross_entropy(own.logits, batch.labels, normaliser=normaliser), none
        loss = fused_divergence(
            own.logits,
            teacher.logits,
            batch.labels,
            divergence=self.divergence,
            normaliser=normaliser,
        )
        if self.states is None:
            return loss, none
        states = self.states(own.states, teacher.states, batch.labels != IGNORE) / normaliser
        return loss + alpha * states, states.detach()


def predict(model: PreTrainedModel, batch: Batch, places: tuple[Place, ...] = ()) -> Computed:
    """One forward pass: states after the final norm with the head that reads them, and `places`."""
    with capturing(model, places) as states:
        # Without a mask and a cache, positions that begin again keep documents from each other.
        out = model.base_model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
        )
    weight, bias, shard = own_rows(model.get_output_embeddings())
    config = model.config.to_dict()
    rule = logit_rule(family_of(config), config)
    logits = DeferredLogits(out.last_hidden_state, weight, rule, bias, shard=shard)
    return Computed(logits, states)
