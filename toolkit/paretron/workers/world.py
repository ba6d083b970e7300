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
from torch.distributed.rendezvous import rendezvous

from paretron.errors import Code, ParetronError, Problem

# A rank that waits longer than this for the others takes them for dead.
COLLECTIVE_TIMEOUT_S = 1800


@dataclass(frozen=True)
class World:
    """The processes of one task; `mesh` is None when this one is alone.

    They talk over the connections of `group`; None stands for those that all work shares. Where
    models are cut over processes, those of `tensor_mesh` hold one model together and do the same
    work, and `mesh` joins this process to those that hold the same part as it does.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None
    group: dist.ProcessGroup | None = None
    tensor_mesh: DeviceMesh | None = None

    @property
    def leads(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    @property
    def share(self) -> int:
        """Which share of the data is this process's; those that hold one model have the same."""
        return self.rank // self._together

    @property
    def shares(self) -> int:
        """Into how many shares the data goes."""
        return self.size // self._together

    @property
    def _together(self) -> int:
        return 1 if self.tensor_mesh is None else self.tensor_mesh.size()

    def total(self, *values: float) -> list[float]:
        """Each value summed over the shares of the data, in fp64; every process gets the sums."""
        if self.mesh is None:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums, group=self.mesh.get_group())
        return [float(x) for x in sums.tolist()]

    def summed(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor summed over the shares of the data; every process gets the sums."""
        if self.mesh is None:
            return tensor
        sums = tensor.to(self.device, copy=True)
        dist.all_reduce(sums, group=self.mesh.get_group())
        return sums.to(tensor.device)

    def anyone(self, says: bool) -> bool:
        """Whether it is so in any process; every process gets the answer."""
        if self.mesh is None:
            return says
        said = torch.tensor([float(says)], device=self.device)
        dist.all_reduce(said, dist.ReduceOp.MAX)
        return bool(said)

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
def joined_world(
    *, timeout_s: int = COLLECTIVE_TIMEOUT_S, tensor_parallel: int = 1
) -> Iterator[World]:
    """The world that torchrun's environment describes, or this process alone.

    A collective call that the others do not join within `timeout_s` seconds fails. Each
    `tensor_parallel` processes in a row hold one model together; USAGE where that does not come
    out even.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if size % tensor_parallel:
        raise ParetronError(
            Problem(
                Code.USAGE,
                f"{size} processes do not fall into groups of {tensor_parallel}",
                where="tensor_parallel",
                fix=f"start a multiple of {tensor_parallel} processes",
            )
        )
    device = _device(int(os.environ.get("LOCAL_RANK", "0")))
    if size == 1:
        yield World(0, 1, device)
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(
        backend, store=_store(timeout), rank=rank, world_size=size, timeout=timeout
    )
    try:
        if tensor_parallel == 1:
            yield World(rank, size, device, init_device_mesh(device.type, (size,)))
        else:
            meshes = init_device_mesh(
                device.type,
                (size // tensor_parallel, tensor_parallel),
                mesh_dim_names=("data", "tensor"),
            )
            yield World(rank, size, device, meshes["data"], tensor_mesh=meshes["tensor"])
        dist.barrier()  # nobody leaves while another still speaks
    finally:
        dist.destroy_process_group()


def _store(timeout: timedelta) -> dist.Store:
    """Where the processes find each other, apart from those of an attempt before.

    Of a static rendezvous, torchrun's own store outlives a restart, and with it the addresses of
    processes that are dead: who read them would wait for those.
    """
    store, _, _ = next(rendezvous("env://", timeout=timeout))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"attempt-{attempt}", store)


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
