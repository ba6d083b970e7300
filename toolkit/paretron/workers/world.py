"""The processes that work together under torchrun: who takes part, and how sums are made.

One process uses no torch.distributed at all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

# A rank that waits longer than this for the others takes them for dead.
COLLECTIVE_TIMEOUT_S = 1800


@dataclass(frozen=True)
class World:
    """The processes of one task; `mesh` is None when this one is alone.

    They talk over the connections of `group`; None stands for those that all work shares.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None
    group: dist.ProcessGroup | None = None

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

    def summed(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor summed over all processes; every process gets the sums."""
        if self.mesh is None:
            return tensor
        sums = tensor.to(self.device, copy=True)
        dist.all_reduce(sums)
        return sums.to(tensor.device)

    def from_leader(self, value: Any) -> Any:
        """What the leading process passes in, on every process; also a barrier."""
        if self.mesh is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def apart(self) -> World:
        """The same processes with connections of their own, for a thread beside the work.

        Every process must ask for them at the same time.
        """
        if self.mesh is None:
            return self
        return replace(self, group=dist.new_group(backend="gloo"))


@contextmanager
def joined_world(*, timeout_s: int = COLLECTIVE_TIMEOUT_S) -> Iterator[World]:
    """The world that torchrun's environment describes, or this process alone.

    A collective call that the others do not join within `timeout_s` seconds fails.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = _device(int(os.environ.get("LOCAL_RANK", "0")))
    if size == 1:
        yield World(0, 1, device)
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    try:
        yield World(rank, size, device, init_device_mesh(device.type, (size,)))
        dist.barrier()  # nobody leaves while another still speaks
    finally:
        dist.destroy_process_group()


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
