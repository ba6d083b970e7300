"""How the student is sharded over the processes of a training.

Under torchrun it is sharded with FSDP2 over a one-dimensional mesh: parameters, gradients and
moments live in parts, a layer is gathered while it runs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from paretron.distill.objective import Objective
from paretron.workers.world import World


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
