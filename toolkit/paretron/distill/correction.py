"""A teacher that is corrected on each step's windows while a student learns from it.

Paper 2, section "Teacher correction": the student's teacher is then one that is corrected all the
time. In a step the teacher is asked first and changed last: what a student imitates was said by a
teacher that had not yet been told this text's next tokens, and one forward pass serves both.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from paretron.distill.batches import Batch
from paretron.distill.fused import fused_cross_entropy
from paretron.distill.objective import Computed, predict
from paretron.distill.optimizer import adamw
from paretron.distill.parallel import checkpoint_layers, compile_layers, shard, whole
from paretron.distill.schedule import Place as Moment
from paretron.distill.schedule import Schedule
from paretron.distill.state import training_tensors
from paretron.distill.states import Place
from paretron.recipe import Correct
from paretron.workers.world import World


class CorrectedTeacher(nn.Module):
    """A teacher that can be asked and trained, one module so that parallelism has a root to wrap.

    Dropout stays off, as in a student.
    """

    def __init__(self, model: PreTrainedModel, places: tuple[Place, ...] = ()) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(True)
        self.places = places

    def forward(self, batch: Batch, normaliser: float | None) -> tuple[Tensor | None, Computed]:
        """Its cross entropy on the labels, as a student's, and what it says, without gradients.

        No loss without a `normaliser`.
        """
        said = predict(self.model, batch, self.places)
        loss = None
        if normaliser is not None:
            loss = fused_cross_entropy(said.logits, batch.labels, normaliser=normaliser)
        # The lm_head is gathered in here alone, the student's loss reads it later.
        kept = torch.clone if isinstance(self, FSDPModule) else _same
        bias = said.logits.bias
        logits = replace(
            said.logits.detach(),
            weight=kept(said.logits.weight.detach()),
            bias=None if bias is None else kept(bias.detach()),
        )
        return loss, Computed(logits, {p: state.detach() for p, state in said.states.items()})

    @torch.no_grad()
    def predict(self, batch: Batch) -> Computed:
        """Its prediction for a batch on its own device, by which nothing is learned."""
        _, said = self(batch, None)
        if isinstance(self, FSDPModule):
            self.reshard()  # what a backward pass would do
        return said


def _same(tensor: Tensor) -> Tensor:
    return tensor


@dataclass
class Correction:
    """The training of a teacher alongside that of its student."""

    teacher: CorrectedTeacher
    settings: Correct
    schedule: Schedule
    optimizer: torch.optim.Optimizer
    world: World
    loss: Tensor  # of the step so far, in this process

    @classmethod
    def of(
        cls,
        teacher: CorrectedTeacher,
        settings: Correct,
        distillation: Schedule,
        world: World,
    ) -> Correction:
        """The correction of a teacher on its device, sharded here as a student is; once.

        Errors: RECIPE_VALUE where its tokens hold no whole step of the distillation.
        """
        schedule = distillation.first(
            settings.tokens,
            lr=settings.lr,
            min_lr=settings.min_lr,
            warmup_steps=settings.warmup_steps,
        )
        if settings.activation_checkpointing:
            checkpoint_layers(teacher.model)
        if settings.compile:
            compile_layers(teacher.model)
        dtype = torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
        shard(teacher, teacher.model, world, dtype=dtype)
        none = torch.zeros((), dtype=torch.float64, device=world.device)
        return cls(teacher, settings, schedule, adamw(teacher, settings), world, none)

    def goes_on(self, at: Moment) -> bool:
        """Whether the teacher is corrected in the next step."""
        legs = self.schedule.legs
        return at.phase < len(legs) and legs[at.phase].steps(after=at.tokens) > 0

    def learn(
        self, batch: Batch, *, normaliser: float, autocast: AbstractContextManager[None]
    ) -> Computed:
        """Add a micro-batch's gradients; what the teacher says of it before it has learned it."""
        with autocast:
            loss, said = self.teacher(batch, normaliser)
        loss.backward()
        self.loss = self.loss + loss.detach()
        return said

    def measured(self) -> dict[str, float]:
        """The step's loss over all processes and the gradient's norm, which is clipped."""
        norm = nn.utils.clip_grad_norm_(self.teacher.parameters(), self.settings.clip)
        (loss,) = self.world.total(float(self.loss))
        return {"teacher_loss": loss, "teacher_grad_norm": float(whole(norm))}

    def update(self, at: Moment) -> None:
        """One step of AdamW at this step's learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.learning_rate(at)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss = torch.zeros_like(self.loss)

    def tensors(self, *, step: int) -> dict[str, Tensor]:
        """What a checkpoint holds of a teacher after so many steps, its first or all of them."""
        found = training_tensors(self.teacher, self.optimizer, step=step)
        return {f"teacher/{name}": tensor for name, tensor in found.items()}
