"""How near a training comes to what its devices could do, and how much memory it takes."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel

from paretron.families import family_of
from paretron.families.costs import forward_flops_per_token
from paretron.workers.devices import peak_flop_s
from paretron.workers.world import World

_FORWARD_AND_BACKWARD = 3


@dataclass(frozen=True)
class Meter:
    """What the tokens of a training cost, and the FLOP/s of all its devices where that is known."""

    student: PreTrainedModel
    teacher: PreTrainedModel | None
    device: torch.device
    peak_flop_s: float | None

    @classmethod
    def of(
        cls,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        *,
        dtype: Literal["float32", "bfloat16"],
        world: World,
    ) -> Meter:
        """The meter of a training on the devices of `world`; their table knows bf16 alone."""
        peak = None
        if world.device.type == "cuda" and dtype == "bfloat16":
            peak = peak_flop_s(torch.cuda.get_device_name(world.device))
        return cls(student, teacher, world.device, None if peak is None else peak * world.size)

    def flops_per_token(self, *, seq_len: int, teacher_passes: int = 1) -> int:
        """The student's forward and backward pass and the teacher's forward pass.

        A teacher that learns along has more passes. What activation checkpointing computes a second
        time does not count.
        """
        own = _FORWARD_AND_BACKWARD * _forward(self.student, seq_len)
        asked = 0 if self.teacher is None else _forward(self.teacher, seq_len)
        return own + teacher_passes * asked

    def figures(
        self, *, tokens_per_s: float, seq_len: int, teacher_passes: int = 1
    ) -> dict[str, float | None]:
        """`mfu`, the share of the devices' rate that was used, and `memory_gb` of this process.

        mfu is None where the rate is unknown. Memory is the most that was allocated on a GPU, or
        the most that was resident on a CPU.
        """
        flops = self.flops_per_token(seq_len=seq_len, teacher_passes=teacher_passes)
        used = tokens_per_s * flops
        mfu = None if self.peak_flop_s is None else used / self.peak_flop_s
        return {"mfu": mfu, "memory_gb": peak_memory_bytes(self.device) / 1e9}


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process has had so far, on its device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _forward(model: PreTrainedModel, seq_len: int) -> int:
    config = model.config.to_dict()
    return forward_flops_per_token(family_of(config), config, seq_len=seq_len)
