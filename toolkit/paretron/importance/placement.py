"""Whether a checkpoint is scored as a whole or layer by layer: what memory there is decides."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch

from paretron.artifacts.config import DTYPE_NAMES
from paretron.artifacts.headers import DTYPE_BYTES
from paretron.artifacts.models import load_model
from paretron.artifacts.reader import Checkpoint
from paretron.importance.executor import LayerStack
from paretron.importance.stream import StreamedStack

Placement = Literal["auto", "resident", "streamed"]

# Of the memory there is: activations, statistics and the reading of weights need the rest.
_WEIGHTS_SHARE = 0.7
_STATES_SHARE = 0.4
_CGROUP = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


@dataclass(frozen=True)
class Chosen:
    """How a checkpoint is run, and why; `states_bytes` of memory may hold hidden states."""

    streamed: bool
    weights_bytes: int
    memory_bytes: int
    states_bytes: int

    @property
    def message(self) -> str:
        """One sentence for whoever watches."""
        how = "layer by layer" if self.streamed else "as a whole"
        need, have = self.weights_bytes / 1e9, self.memory_bytes / 1e9
        return f"the model is run {how}: {need:.2f} GB of weights, {have:.2f} GB of memory"


def choose_placement(
    checkpoint: Checkpoint, placement: Placement, *, device: torch.device, processes: int
) -> Chosen:
    """What was asked for, or for "auto" streamed where the weights do not fit.

    Each of the `processes` on this machine holds a model of its own.
    """
    dtype = running_dtype(checkpoint, device)
    elements = sum(e.nbytes // DTYPE_BYTES[e.dtype] for e in checkpoint.entries.values())
    weights = elements * dtype.itemsize
    memory = available_bytes(device) // (processes if device.type == "cpu" else 1)
    streamed = placement == "streamed" or (
        placement == "auto" and weights > memory * _WEIGHTS_SHARE
    )
    return Chosen(streamed, weights, memory, int(memory * _STATES_SHARE))


def load_stack(checkpoint: Checkpoint, chosen: Chosen, *, device: torch.device) -> LayerStack:
    """The checkpoint's layers as chosen; on a CPU in fp32, elsewhere in their own dtype."""
    dtype = running_dtype(checkpoint, device)
    if chosen.streamed:
        return StreamedStack(checkpoint, dtype=dtype, device=device)
    model = load_model(checkpoint.path, dtype=dtype)
    torch.nn.Module.to(model, device)
    return LayerStack(model, checkpoint.family)


def running_dtype(checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """fp32 on a CPU, elsewhere the dtype of most of the weights."""
    if device.type == "cpu":
        return torch.float32
    found: torch.dtype = getattr(torch, DTYPE_NAMES[checkpoint.dtype])
    return found


def available_bytes(device: torch.device) -> int:
    """Memory that is free for this process: the device's, or on a CPU the machine's within the
    limits of the process and its container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = [int(psutil.virtual_memory().available)]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        found.append(limit - int(psutil.Process().memory_info().vms))
    for most, used in _CGROUP:
        try:
            found.append(int(Path(most).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such hierarchy, or "max"
            continue
    return max(0, min(found))
