"""How student and teacher are laid out over the processes and devices of a training.

Under torchrun the student is sharded with FSDP2 over a one-dimensional mesh: parameters, gradients
and moments live in parts, a layer is gathered while it runs. The teacher's layers may be, too.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from paretron.distill.objective import Objective
from paretron.workers.world import World


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Keep of each decoder layer its input alone, and run it again in the backward pass; in place.

    Nothing in a layer is random, so the gradients are the same to the bit. It must come before
    `shard`.
    """
    for layer in model.base_model.layers:
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )


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


def place_teacher(
    model: PreTrainedModel, world: World, *, how: Literal["replicated", "sharded", "offloaded"]
) -> None:
    """Bring a teacher to where it is asked; in place, once.

    "replicated": whole on every device. "sharded": each layer in parts over all devices, gathered
    while it runs. "offloaded": each layer in host memory, on the device while it runs. Embedding
    and lm_head are whole on every device either way: the loss reads them.
    """
    if how == "replicated" or (how == "sharded" and world.mesh is None):
        model.to(world.device)
        return
    body = model.base_model
    layers = list(body.layers)
    for child in (*body.children(), model.get_output_embeddings()):
        if child is not body.layers:
            child.to(world.device)
    if how == "offloaded":
        for layer in layers:
            _rest_in_host_memory(layer, world.device)
        return
    whole_ones = set(body.parameters()) - set(body.layers.parameters())
    for layer in layers:
        fully_shard(layer, mesh=world.mesh, reshard_after_forward=True)
    # A root of all of them, so that the next layer is gathered while one runs.
    fully_shard(body, mesh=world.mesh, ignored_params=whole_ones)


def _rest_in_host_memory(layer: nn.Module, device: torch.device) -> None:
    """Let a layer's weights be on the device from before its forward until after it."""
    resting = {p: p.data.pin_memory() if device.type == "cuda" else p.data for p in _held(layer)}

    def fetch(*_: object) -> None:
        for parameter, data in resting.items():
            parameter.data = data.to(device, non_blocking=True)

    def drop(*_: object) -> None:
        for parameter, data in resting.items():
            parameter.data = data

    drop()
    layer.register_forward_pre_hook(fetch)
    layer.register_forward_hook(drop)


def _held(layer: nn.Module) -> list[Tensor]:
    return [*layer.parameters(), *layer.buffers()]


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its parts gathered; a collective call where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fast_bfloat16(device: torch.device) -> bool:
    """Whether bf16 products are faster than fp32 ones; on a CPU only AMX makes them so."""
    return device.type != "cpu" or bool(torch.cpu.get_capabilities().get("amx_bf16", False))
