"""Trainings with unequal numbers of valid tokens, run by one process or by two: same numbers.

`python two_ranks.py WORK_FOLDER OUT_FOLDER` (also under torchrun) runs every case and writes its
losses, gradient norms and gathered weights.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from paretron.artifacts.models import load_model
from paretron.data.store import TokenStore
from paretron.distill.adapters import choose_trained
from paretron.distill.batches import Batch, Windows
from paretron.distill.correction import CorrectedTeacher, Correction
from paretron.distill.divergences import ForwardKL
from paretron.distill.loop import Trainer
from paretron.distill.losses import IGNORE
from paretron.distill.objective import Objective, Teacher
from paretron.distill.parallel import checkpoint_layers, place_teacher, shard, whole
from paretron.distill.schedule import Schedule
from paretron.distill.state import StateFolder
from paretron.distill.states import StatesLoss
from paretron.recipe import Correct, Distill
from paretron.recipe.training import States
from paretron.workers.stop import StopRequest
from paretron.workers.worker import leave
from paretron.workers.world import World, joined_world

SEQ_LEN = 32
STEPS = 3
# name -> (student's folder, with a teacher, windows of a forward pass)
CASES = {
    "kl": ("student", True, 4),
    "clm": ("student", False, 4),
    "kl-accumulated": ("student", True, 1),
    "kl-tied": ("tied", True, 2),
    "kl-experts": ("experts", True, 2),
    "states": ("student", True, 2),
    "states-accumulated": ("student", True, 1),
    "kl-sharded-teacher": ("student", True, 2),
    "states-checkpointed": ("student", True, 2),
    "kl-corrected": ("student", True, 2),
    "states-corrected-norms": ("student", True, 1),
}
STATES = States(embedding=True, output=((1, 0),), mlp_input=((0, 1),), attention=((1, 1),))


class Ragged(Windows):
    """Windows of which the later ones of a batch count for fewer and fewer positions."""

    def batch(self, window_ids: Sequence[int]) -> Batch:
        whole_batch = super().batch(window_ids)
        for row, number in enumerate(window_ids):
            whole_batch.labels[row, 3 + 7 * (number % 5) :] = IGNORE
        return whole_batch


def trainer_of(name: str, work: Path, out: Path, world: World) -> Trainer:
    student, with_teacher, micro_batch = CASES[name]
    teacher, model, states = load_model(work / "teacher"), load_model(work / student), None
    if name.startswith("states"):
        torch.manual_seed(0)
        states = StatesLoss.between(model, teacher, STATES)
    places = states.teacher_places if states else ()
    asked = CorrectedTeacher(teacher, places) if "corrected" in name else Teacher(teacher, places)
    if name.endswith("sharded-teacher"):
        place_teacher(teacher, world, how="sharded")
        inside = [p for p in teacher.base_model.layers.parameters() if isinstance(p, DTensor)]
        assert bool(inside) == (world.size > 1)
    if name.endswith("checkpointed"):
        checkpoint_layers(model)
    objective = Objective(model, divergence=ForwardKL(2.0), states=states)
    shard(objective, model, world, dtype=torch.float32)
    store = TokenStore.open(work / "tokens")
    settings = Distill(
        tokens=STEPS * 8 * SEQ_LEN, global_batch=8, micro_batch=micro_batch, lr=1e-3, min_lr=1e-4,
        warmup_steps=0, dtype="float32", eval_every=2, clip=0.5,
    )  # fmt: skip
    correction = None
    if isinstance(asked, CorrectedTeacher):
        correction = correct(asked, settings, "norms" if name.endswith("norms") else "all", world)
    return Trainer(
        objective=objective,
        teacher=asked if with_teacher else None,
        alpha="dynamic",
        train_windows=Ragged(store, SEQ_LEN, 320),
        validation_windows=Ragged(store, 1000, 320),
        settings=settings,
        seed=3,
        world=world,
        state=StateFolder(out / f"{name}-state", {}, world, lambda kind, fields: None),
        stop=StopRequest(),
        on_event=lambda kind, fields: None,
        correction=correction,
    )


def run_case(name: str, work: Path, out: Path, world: World) -> None:
    trainer = trainer_of(name, work, out, world)
    objective, correction = trainer.objective, trainer.correction
    history = trainer.run()
    # Validation was the last to gather weights; a checkpoint finds moments by their parts.
    assert all(isinstance(p, DTensor) == (world.size > 1) for p in objective.parameters())
    weights = {k: whole(p.detach()).clone() for k, p in objective.student.named_parameters()}
    if correction is not None:
        again = trainer_of(name, work, out, world)
        again.resume()
        known = {key: own(tensor) for key, tensor in trainer.tensors().items()}
        assert sum(key.startswith("teacher/") for key in known) >= 3
        assert all(torch.equal(own(tensor), known[key]) for key, tensor in again.tensors().items())
        after = correction.teacher.model.named_parameters()
        weights |= {f"teacher/{k}": whole(p.detach()).clone() for k, p in after}
    if world.leads:
        (out / f"{name}.json").write_text(json.dumps(history.as_json()))
        save_file(weights, out / f"{name}.safetensors")


def own(tensor: Tensor) -> Tensor:
    """The part of it that is this process's."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def correct(asked: CorrectedTeacher, settings: Distill, what: str, world: World) -> Correction:
    """A teacher that learns in all steps but the last, and teaches on as it is then."""
    shared = settings.model_dump(include=set(Correct.OF_DISTILL))
    wanted = {"tokens": (STEPS - 1) * 8 * SEQ_LEN, "mode": "parallel", "what": what, "lr": 1e-3}
    wanted |= {"min_lr": 1e-4, "warmup_steps": 0, "clip": 0.3}
    section = Correct.model_validate(shared | wanted)
    choose_trained(asked.model, section, seed=3)
    return Correction.of(asked, section, Schedule.of(settings, seq_len=SEQ_LEN), world)


def main(work: Path, out: Path) -> None:
    with joined_world() as world:
        for name in CASES:
            run_case(name, work, out, world)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    leave(0)
