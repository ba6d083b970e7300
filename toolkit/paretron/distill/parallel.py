"""Processes around the training: who takes part, how the student is sharded, how sums are made.

One process uses no torch.distributed at all. Under torchrun the student is sharded with FSDP2 over
a one-dimensional mesh: parameters, gradients and moments live in parts, a layer is gathered while
it runs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from paretron.distill.objective import Objective

# A rank that waits longer than this for the others is taken for dead.
_COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """The processes of one training; `mesh` is None when this one is alone."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None

    @property
    def leads(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def total(self, *values: float) -> list[float]:
        """Each value summed over all processes, in fp64; every process gets the sums."""
        if self.mesh is None:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return [float(x) for x in sums.tolist()]

    def from_leader(self, value: Any) -> Any:
        """What the leading process passes in, on every process; also a barrier."""
        if self.mesh is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


@contextmanager
def joined_world() -> Iterator[World]:
    """The world that torchrun's environment describes, or this process alone."""
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = _device(int(os.environ.get("LOCAL_RANK", "0")))
    if size == 1:
        yield World(0, 1, device)
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=_COLLECTIVE_TIMEOUT)
    try:
        yield World(rank, size, device, init_device_mesh(device.type, (size,)))
        dist.barrier()  # nobody leaves while another still speaks
    finally:
        dist.destroy_process_group()


def shard(objective: Objective, world: World, *, dtype: torch.dtype) -> None:
    """Shard every decoder layer and, as one more unit, all the rest; in place, once.

    The lm_head belongs to the root unit, whose forward encloses the fused loss: there the loss
    finds it gathered, and its gradient is reduced with that of the embedding. Gradients are
    summed, not averaged, for the loss is already divided by the tokens of all processes.
    """
    if world.mesh is None:
        return
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    units: list[nn.Module] = [*objective.student.base_model.layers, objective]
    for unit in units:
        sharded: FSDPModule = fully_shard(unit, mesh=world.mesh, mp_policy=policy)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its parts gathered; a collective call where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fast_bfloat16(device: torch.device) -> bool:
    """Whether bf16 products are faster than fp32 ones; on a CPU only AMX makes them so."""
    return device.type != "cpu" or bool(torch.cpu.get_capabilities().get("amx_bf16", False))


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
