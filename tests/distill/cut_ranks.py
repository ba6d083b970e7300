"""Trainings of models that are cut over two processes, or run by one process: the same numbers.

`python cut_ranks.py WORK_FOLDER OUT_FOLDER` (also under torchrun) runs every case and writes its
losses, gradient norms and gathered weights; two processes also check what lies in them.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh

from paretron.artifacts.models import load_model
from paretron.data.store import TokenStore
from paretron.distill import fused
from paretron.distill.batches import Windows
from paretron.distill.divergences import ForwardKL
from paretron.distill.loop import Trainer
from paretron.distill.objective import Objective, Teacher
from paretron.distill.parallel import (
    checkpoint_layers,
    compile_layers,
    place,
    place_teacher,
    shard,
    whole,
)
from paretron.distill.state import StateFolder
from paretron.distill.states import StatesLoss
from paretron.recipe import Distill
from paretron.recipe.training import States
from paretron.workers.stop import StopRequest
from paretron.workers.worker import leave
from paretron.workers.world import World, joined_world

SEQ_LEN, STEPS, VOCAB = 32, 3, 320
FAMILIES = ("llama", "qwen3", "gemma2", "nemotron")
AGAIN = "qwen3"  # the case that goes on from its second step
STATES = States(embedding=True, output=((1, 0),), mlp_input=((0, 1),))


def trainer(
    family: str,
    name: str,
    work: Path,
    out: Path,
    world: World,
    *,
    compiled: bool = False,
    **settings: Any,
) -> Trainer:
    """A training of a family's student; llama's imitates states, too."""
    dtype = torch.bfloat16 if settings.get("dtype") == "bfloat16" else torch.float32
    student, other = load_model(work / family), load_model(work / f"{family}-teacher", dtype=dtype)
    states = None
    if family == "llama" and not compiled:
        torch.manual_seed(0)
        states = StatesLoss.between(student, other, STATES)
    place(student, world)
    teacher = Teacher(other, states.teacher_places if states else ())
    if compiled:
        checkpoint_layers(student)
        compile_layers(student)
        compile_layers(other)
    place_teacher(other, world, how="sharded" if family == "gemma2" else "replicated")
    objective = Objective(student, divergence=ForwardKL(2.0), states=states)
    shard(objective, student, world, dtype=dtype)
    store = TokenStore.open(work / "tokens")
    return Trainer(
        objective=objective,
        teacher=teacher,
        alpha="dynamic",
        train_windows=Windows(store, SEQ_LEN, VOCAB),
        validation_windows=Windows(store, 1000, VOCAB),
        settings=Distill.model_validate(
            {
                "tokens": STEPS * 8 * SEQ_LEN, "global_batch": 8, "micro_batch": 4, "lr": 1e-4,
                "min_lr": 1e-5, "warmup_steps": 0, "dtype": "float32", "eval_every": 2,
                "clip": 0.5, "checkpoint_every": 2,
            }
            | settings
        ),
        seed=3,
        world=world,
        state=StateFolder(out / f"{name}-state", {}, world, lambda kind, fields: None),
        stop=StopRequest(),
        on_event=lambda kind, fields: None,
    )  # fmt: skip


def run(name: str, training: Trainer, out: Path) -> None:
    history = training.run()
    student = training.objective.student
    weights = {k: whole(p.detach()).clone() for k, p in student.named_parameters()}
    if training.world.leads:
        (out / f"{name}.json").write_text(json.dumps(history.as_json()))
        save_file(weights, out / f"{name}.safetensors")


def goes_on(source: Path, name: str, work: Path, out: Path, world: World) -> None:
    """The training of AGAIN from the second step of another folder's."""
    if world.leads:
        shutil.copytree(
            source / f"{AGAIN}-state" / "step-000002", out / f"{name}-state" / "step-000002"
        )
    world.from_leader(None)
    run(name, trainer(AGAIN, name, work, out, world), out)


@contextmanager
def logits_seen() -> Iterator[set[int]]:
    """How many tokens' logits were there at once in this process."""
    widths: set[int] = set()
    make = fused._buffer

    def watched(*given: Any) -> torch.Tensor:
        buffer = make(*given)
        widths.add(buffer.shape[1])
        return buffer

    with mock.patch.object(fused, "_buffer", watched):
        yield widths


def check_precision(work: Path, out: Path, world: World) -> None:
    """bf16 is the arithmetic of layers; weights, moments and the sums of gradients are fp32."""
    name = f"bf16-{world.shares}"
    training = trainer("qwen3", name, work, out, world, dtype="bfloat16")
    seen: set[torch.dtype] = set()
    mlp = training.objective.student.base_model.layers[0].mlp
    mlp.register_forward_hook(lambda _m, _a, output: seen.add(output.dtype))
    reduced: set[torch.dtype] = set()
    scatter = dist.reduce_scatter_single

    def watched(**given: Any) -> Any:
        reduced.add(given["output"].dtype)
        return scatter(**given)

    with mock.patch.object(dist, "reduce_scatter_single", watched):
        run(name, training, out)
    assert seen == {torch.bfloat16}
    assert reduced == ({torch.float32} if world.shares > 1 else set())
    for parameter in training.objective.parameters():
        moments = training.optimizer.state[parameter]
        found = {parameter.dtype, moments["exp_avg"].dtype, moments["exp_avg_sq"].dtype}
        assert found == {torch.float32}


def main(work: Path, out: Path) -> None:
    with joined_world(
        timeout_s=200, tensor_parallel=int(os.environ.get("WORLD_SIZE", "1"))
    ) as world:
        cut = world.size > 1
        for family in FAMILIES:
            with logits_seen() as widths:
                run(family, trainer(family, family, work, out, world), out)
            assert widths == {VOCAB // world.size}
        if cut:
            assert (world.share, world.shares, world.total(1.0)) == (0, 1, [1.0])
            assert world.anyone(world.rank == 1)
            assert not world.anyone(False)
            goes_on(out, "again", work, out, world)
            goes_on(out.with_name("one"), "from-one", work, out, world)
            check_precision(work, out, world)
            shared = World(
                world.rank, world.size, world.device, init_device_mesh("cpu", (world.size,))
            )
            check_precision(work, out, shared)
            torch.compile = partial(torch.compile, backend="aot_eager")  # codegen takes minutes
            run("compiled", trainer("qwen3", "compiled", work, out, shared, compiled=True), out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    leave(0)
