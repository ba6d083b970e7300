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
from torch.distributed.tensor import DTensor

from paretron.artifacts.models import load_model
from paretron.data.store import TokenStore
from paretron.distill.batches import Batch, Windows
from paretron.distill.divergences import ForwardKL
from paretron.distill.loop import Trainer
from paretron.distill.losses import IGNORE
from paretron.distill.objective import Objective, Teacher
from paretron.distill.parallel import checkpoint_layers, place_teacher, shard, whole
from paretron.distill.state import StateFolder
from paretron.distill.states import StatesLoss
from paretron.recipe import Distill
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
}
STATES = States(embedding=True, output=((1, 0),), mlp_input=((0, 1),), attention=((1, 1),))


class Ragged(Windows):
    """Windows of which the later ones of a batch count for fewer and fewer positions."""

    def batch(self, window_ids: Sequence[int]) -> Batch:
        whole_batch = super().batch(window_ids)
        for row, number in enumerate(window_ids):
            whole_batch.labels[row, 3 + 7 * (number % 5) :] = IGNORE
        return whole_batch


def run_case(name: str, work: Path, out: Path, world: World) -> None:
    student, with_teacher, micro_batch = CASES[name]
    teacher, own, states = load_model(work / "teacher"), load_model(work / student), None
    if name.startswith("states"):
        torch.manual_seed(0)
        states = StatesLoss.between(own, teacher, STATES)
    asked = Teacher(teacher, states.teacher_places if states else ())
    if name.endswith("sharded-teacher"):
        place_teacher(teacher, world, how="sharded")
        inside = [p for p in teacher.base_model.layers.parameters() if isinstance(p, DTensor)]
        assert bool(inside) == (world.size > 1)
    if name.endswith("checkpointed"):
        checkpoint_layers(own)
    objective = Objective(own, divergence=ForwardKL(2.0), states=states)
    shard(objective, world, dtype=torch.float32)
    store = TokenStore.open(work / "tokens")
    settings = Distill(
        tokens=STEPS * 8 * SEQ_LEN, global_batch=8, micro_batch=micro_batch, lr=1e-3, min_lr=1e-4,
        warmup_steps=0, dtype="float32", eval_every=2, clip=0.5,
    )  # fmt: skip
    trainer = Trainer(
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
    )
    history = trainer.run()
    weights = {k: whole(p.detach()).clone() for k, p in objective.student.named_parameters()}
    if world.leads:
        (out / f"{name}.json").write_text(json.dumps(history.as_json()))
        save_file(weights, out / f"{name}.safetensors")


def main(work: Path, out: Path) -> None:
    with joined_world() as world:
        for name in CASES:
            run_case(name, work, out, world)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    leave(0)
