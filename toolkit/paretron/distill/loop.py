"""The training loop, in the order in which it runs.

Everything random is decided by (seed, step): a resumed training goes on bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from paretron.artifacts.jsonfile import dump
from paretron.distill.batches import Batch, Windows
from paretron.distill.correction import CorrectedTeacher, Correction
from paretron.distill.history import History
from paretron.distill.job import OnEvent
from paretron.distill.meter import Meter
from paretron.distill.objective import Objective, Prediction, Teacher, Teaches
from paretron.distill.optimizer import adamw
from paretron.distill.parallel import whole
from paretron.distill.saving import Saves
from paretron.distill.schedule import Leg, Place, Schedule, place_after
from paretron.distill.state import StateFolder, training_tensors
from paretron.distill.validate import validation_loss
from paretron.errors import Code, ParetronError, Problem
from paretron.recipe import Pretrain, Training
from paretron.workers.stop import StopRequest
from paretron.workers.world import World


@dataclass
class Trainer:
    """One training from its newest checkpoint to its last step."""

    objective: Objective
    teacher: Teaches | None
    alpha: Literal["dynamic"] | float  # the weight of intermediate states, where they are imitated
    train_windows: Windows
    validation_windows: Windows | None
    settings: Training
    seed: int
    world: World
    state: StateFolder
    stop: StopRequest
    on_event: OnEvent
    correction: Correction | None = None  # of the teacher, where it learns along
    step: int = 0
    history: History = field(default_factory=History)

    def __post_init__(self) -> None:
        self.schedule = Schedule.of(self.settings, seq_len=self.train_windows.seq_len)
        self.place = Place()
        self.steps, self.tokens = self.schedule.left(self.place)
        self.optimizer = adamw(self.objective, self.settings)
        asked = self.teacher.model if isinstance(self.teacher, Teacher | CorrectedTeacher) else None
        self.meter = Meter.of(
            self.objective.student, asked, dtype=self.settings.dtype, world=self.world
        )
        self.first_tokens = 0
        self.seconds = 0.0  # spent in the steps of this process, for the rate shown

    def run(self) -> History:
        """Train to the last step and return the curves.

        Errors: GATE_NONFINITE, INTERRUPTED (after saving), RUN_MISMATCH, INPUT_MANIFEST, DISK.
        """
        self.resume()
        saves = Saves(self.state, step=self.step)
        try:
            while True:
                self.validate_if_due()
                self.tell_saved(saves)
                if self.step == self.steps:
                    break
                self.stop_if_asked(saves)
                self.train_step()
                if self.step % self.settings.checkpoint_every == 0:
                    self.save(saves)
            # A process that dies while the result is written need not train again.
            self.save(saves)
            self.finish_saving(saves)
        except BaseException:
            saves.abandon()
            raise
        return self.history

    def resume(self) -> None:
        """Continue from the newest intact checkpoint, where there is one."""
        self.step, self.history = self.state.resume(self.tensors())
        self.tensors()
        self.first_tokens = self.history.tokens
        self.schedule = self.schedule.resumed(
            self.history.train, num_tokens=self.train_windows.store.num_tokens, seed=self.seed
        )
        self.place = self.schedule.entered(place_after(self.history.train))
        steps, tokens = self.schedule.left(self.place)
        self.steps, self.tokens = self.step + steps, self.history.tokens + tokens
        if self.step:
            self.on_event("note", {"message": f"resumed after step {self.step} of {self.steps}"})
            before = self.history.tokens_of_last_step
            if steps and self.place.tokens and before != (now := self.leg.tokens_per_step):
                message = f"from step {self.step + 1} on {now} tokens a step, {before} before"
                self.on_event("note", {"message": message})
            length = self.history.train[-1]["seq_len"]
            if steps and self.place.tokens and length != (now := self.leg.seq_len):
                message = f"from step {self.step + 1} on windows of {now} tokens, {length} before"
                self.on_event("note", {"message": message})

    def train_step(self) -> None:
        """Batch, forward and backward, check, clip, update, report."""
        started = time.perf_counter()
        window_ids = self.window_ids()
        batch = self.local_batch(window_ids)
        (valid,) = self.world.total(batch.valid)
        alpha = self.states_weight(batch, normaliser=valid)
        micro_losses = [
            self.forward_backward(part, normaliser=valid, alpha=alpha)
            for part in batch.split(self.leg.micro_batch)
        ]
        grad_norm = self.clip()
        both = torch.stack(micro_losses).sum(0)
        loss, states, norm = torch.cat([both, grad_norm.double()[None]]).tolist()
        loss, states = self.world.total(loss, states)
        measured = {"loss": loss, "grad_norm": norm}
        corrected = self.correction.measured() if self.correction and self.corrects else {}
        if not all(map(math.isfinite, (measured | corrected).values())):
            raise self.not_finite(window_ids, measured | corrected)
        lr = self.update()
        self.seconds += time.perf_counter() - started
        parts = {"logits": loss - alpha * states, "states": states} if self.objective.states else {}
        self.report(loss=loss, lr=lr, grad_norm=norm, parts=parts | corrected)

    def window_ids(self) -> list[int]:
        """The windows of this step, over all processes."""
        blocks = self.train_windows.store.windows(self.schedule.block_len)
        return self.schedule.window_ids(self.place, num_blocks=blocks, seed=self.seed)

    @property
    def leg(self) -> Leg:
        """The phase that this step belongs to."""
        return self.schedule.leg(self.place)

    @property
    def corrects(self) -> bool:
        """Whether this step corrects the teacher."""
        return self.correction is not None and self.correction.goes_on(self.place)

    @property
    def windows(self) -> Windows:
        """The text in windows of this step's length."""
        begun = self.schedule.continuation
        unread = begun.unread if begun else None
        return replace(self.train_windows, seq_len=self.leg.seq_len, unread=unread)

    def local_batch(self, window_ids: list[int]) -> Batch:
        """This process's share of the step's windows: as many as every other process has."""
        share = len(window_ids) // self.world.shares
        mine = window_ids[self.world.share * share : (self.world.share + 1) * share]
        return self.windows.batch(mine)

    def states_weight(self, batch: Batch, *, normaliser: float) -> float:
        """alpha = L_logits / L_is of the step before; of this one, before it, for the first.

        The sums are those of the whole step over all processes, so that neither accumulation nor
        the number of processes decides it, and a resumed training finds them in its history.
        """
        if self.objective.states is None or self.alpha != "dynamic":
            return 1.0 if self.alpha == "dynamic" else self.alpha
        if self.history.train:
            last = self.history.train[-1]
            logits, states = last["logits"], last["states"]
        else:
            with torch.no_grad():
                parts = [
                    self.forward(part, normaliser=normaliser, alpha=0.0)
                    for part in batch.split(self.leg.micro_batch)
                ]
            logits, states = self.world.total(*torch.stack(parts).sum(0).tolist())
        return logits / states if states else 1.0

    def forward_backward(self, batch: Batch, *, normaliser: float, alpha: float) -> Tensor:
        """Add a micro-batch's gradients, a learning teacher's too; what `forward` gives of it."""
        said = None
        if self.correction is not None and self.corrects:
            said = self.correction.learn(
                batch.to(self.world.device), normaliser=normaliser, autocast=self.autocast()
            )
        losses = self.forward(batch, normaliser=normaliser, alpha=alpha, said=said)
        losses[0].backward()
        return losses.detach()

    def forward(
        self, batch: Batch, *, normaliser: float, alpha: float, said: Prediction | None = None
    ) -> Tensor:
        """A micro-batch's loss and, of it, the unweighted states, fp64 [2].

        The teacher is asked unless it has `said` what it says of this micro-batch.
        """
        batch = batch.to(self.world.device)
        with self.autocast():
            if said is None and self.teacher is not None:
                said = self.teacher.predict(batch)
            losses = self.objective(batch, said, normaliser, alpha)
        return torch.stack(losses)

    def clip(self) -> Tensor:
        """Scale the gradient down to the allowed norm; the norm before that."""
        norm = nn.utils.clip_grad_norm_(self.objective.parameters(), self.settings.clip)
        return whole(norm)

    def update(self) -> float:
        """One step of AdamW at this step's learning rate, which is returned; the teacher's too."""
        if self.correction is not None and self.corrects:
            self.correction.update(self.place)
        lr = self.schedule.learning_rate(self.place)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return lr

    def report(
        self, *, loss: float, lr: float, grad_norm: float, parts: Mapping[str, float]
    ) -> None:
        """Append to the curves and tell who watches."""
        tokens = self.history.tokens + self.leg.tokens_per_step
        seq_len = self.leg.seq_len
        asking = self.correction.settings.passes if self.correction and self.corrects else 1
        parts = {**parts, "seq_len": seq_len}
        if len(self.schedule.legs) > 1:
            parts["phase"] = self.place.phase
        self.history.add_step(tokens=tokens, loss=loss, lr=lr, grad_norm=grad_norm, parts=parts)
        self.place = self.schedule.after(self.place)
        rate = (tokens - self.first_tokens) / self.seconds
        self.on_event("progress", {"done": tokens, "total": self.tokens, "unit": "tokens"})
        self.on_event(
            "step",
            {
                "step": self.step, "steps": self.steps, "tokens": tokens, "loss": loss,
                "tokens_per_s": rate, "eta_s": (self.tokens - tokens) / rate,
                "lr": lr, "grad_norm": grad_norm, **parts,
                **self.meter.figures(tokens_per_s=rate, seq_len=seq_len, teacher_passes=asking),
            },
        )  # fmt: skip

    def validate_if_due(self) -> None:
        """Measure the validation loss at the start, every `eval_every` steps and at the end."""
        tokens = self.history.tokens
        due = self.step % self.settings.eval_every == 0 or self.step == self.steps
        if self.step == 0 and isinstance(self.settings, Pretrain):
            due = False  # random weights: the logarithm of the vocabulary, as everybody knows
        if self.validation_windows is None or not due or self.history.validated(tokens):
            return
        with self.autocast():
            loss = validation_loss(
                self.objective,
                self.validation_windows,
                micro_batch=self.settings.micro_batch,
                world=self.world,
            )
        self.history.add_validation(tokens=tokens, loss=loss)
        self.on_event("eval", {"step": self.step, "tokens": tokens, "loss": loss})

    def stop_if_asked(self, saves: Saves) -> None:
        """Save and raise INTERRUPTED when any process was asked to stop."""
        if not self.world.anyone(self.stop.made):
            return
        self.save(saves)
        self.finish_saving(saves)
        raise ParetronError(
            Problem(
                Code.INTERRUPTED,
                f"stopped on request; {self.step} of {self.steps} steps are saved",
                where=str(self.state.folder),
                fix="run the same command again to go on",
            )
        )

    def save(self, saves: Saves) -> None:
        """Begin a checkpoint of this step, unless there is one, when that before it is complete."""
        self.finish_saving(saves)
        saves.begin(self.step, self.tensors(), self.history)

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint of this step holds; what it is filled with when resumed."""
        tensors = training_tensors(self.objective, self.optimizer, step=self.step)
        if self.correction is not None:
            tensors |= self.correction.tensors(step=self.step)
        return tensors

    def finish_saving(self, saves: Saves) -> None:
        """Wait until nothing is being written."""
        saves.finish()
        self.tell_saved(saves)

    def tell_saved(self, saves: Saves) -> None:
        """Tell who watches of a checkpoint that is complete now; raise what kept it from it."""
        step = saves.newly_published()
        if step is not None:
            self.on_event("checkpoint", {"saved_step": step})

    def autocast(self) -> AbstractContextManager[None]:
        """bf16 arithmetic over fp32 weights; a sharded student casts by its own policy."""
        enabled = self.settings.dtype == "bfloat16" and self.world.mesh is None
        return torch.autocast(self.world.device.type, dtype=torch.bfloat16, enabled=enabled)

    def not_finite(self, window_ids: list[int], measured: Mapping[str, float]) -> ParetronError:
        """GATE_NONFINITE, with the batch on record; weights and checkpoints were not touched."""
        record = self.state.folder / f"nonfinite-step-{self.step + 1:06d}.json"
        if self.world.leads:
            facts = {
                "step": self.step + 1,
                **{name: str(value) for name, value in measured.items()},
                "window_ids": window_ids,
                "seq_len": self.leg.seq_len,
                "store": str(self.train_windows.store.folder),
            }
            dump(record, facts)
        return ParetronError(
            Problem(
                Code.GATE_NONFINITE,
                f"step {self.step + 1}: "
                f"{', '.join(f'{name} {value}' for name, value in measured.items())}; "
                "nothing of it was learned or saved",
                where=str(record),
                fix="a lower lr or a longer warm-up; the file names the windows of this batch",
            )
        )
