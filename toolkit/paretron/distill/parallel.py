"""How student and teacher are laid out over the processes and devices of a training.

Under torchrun the student is sharded with FSDP2 over a one-dimensional mesh: parameters, gradients
and moments live in parts, a layer is gathered while it runs. The teacher's layers may be, too. If
both are cut (`tensor_parallel`), that mesh joins the processes that hold the same part of a layer,
and what is gathered is that part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from paretron.artifacts.config import family_and_config
from paretron.distill.tensor_parallel import cut_over, keep_whole
from paretron.errors import Code, ParetronError, Problem, raise_all
from paretron.families.cuts import cut_problems
from paretron.recipe import Correct, Distill, Pretrain, Training
from paretron.recipe.devices import device_problems
from paretron.workers.world import World

_SECTIONS: dict[type[Training], str] = {
    Training: "training", Pretrain: "teacher.pretrain", Correct: "correct", Distill: "distill"
}  # fmt: skip


def check_devices(settings: Training, models: Iterable[Path], world: World, *, apart: bool) -> None:
    """Refuse, before a weight is read, what the models or this machine cannot be trained with.

    Errors: UNSUPPORTED, RECIPE_VALUE, OPTIONAL_MISSING, DEVICE.
    """
    where = _SECTIONS[type(settings)]
    problems: list[Problem] = []
    for path in models:
        family, config = family_and_config(path)
        capped = config.get(family.attention_softcap) is not None
        degree = settings.tensor_parallel
        problems += cut_problems(family, config, degree=degree, where=f"{where}.tensor_parallel")
        problems += device_problems(settings, capped=capped, apart=apart, where=where)
    where = f"{where}.attention"
    if settings.attention != "sdpa" and world.device.type != "cuda":
        cause = f"{settings.attention} runs on CUDA devices, and here is none"
        problems.append(Problem(Code.DEVICE, cause, where=where, fix="attention: sdpa"))
    elif settings.attention != "sdpa" and not problems and not is_flash_attn_2_available():
        # In its place transformers might fetch a kernel from the hub: code of others.
        cause = "flash-attn is installed, but not so that transformers can use it"
        fix = "pip install flash-attn --no-build-isolation (2.3.3 or later), or attention: sdpa"
        problems.append(Problem(Code.OPTIONAL_MISSING, cause, where=where, fix=fix))
    raise_all(tuple(dict.fromkeys(problems)))


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Keep of each decoder layer its input alone, and run it again in the backward pass; in place.

    Nothing in a layer is random, so the gradients are the same to the bit. It must come before
    `shard`.
    """
    for layer in model.base_model.layers:
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )


def compile_layers(model: PreTrainedModel) -> None:
    """Compile what each decoder layer computes, when it is first asked; in place.

    Layers of one kind share one program. It must come after `checkpoint_layers` and before `shard`,
    so that what is computed again is compiled too, and gathering stays outside.
    """
    for layer in model.base_model.layers:
        layer.forward = torch.compile(layer.forward)


@contextmanager
def compiler_explained(settings: Training) -> Iterator[None]:
    """Turn what a compiler could not do inside into ENGINE (exit 4)."""
    try:
        yield
    except BackendCompilerFailed as error:
        reason, *rest = str(error).splitlines()
        said = " ".join([reason, *(line for line in rest if "error:" in line.lower())])
        raise ParetronError(
            Problem(
                Code.ENGINE,
                f"a layer cannot be compiled here: {' '.join(said.split())[:400]}",
                where=f"{_SECTIONS[type(settings)]}.compile",
                fix="name a working compiler in CXX, or compile: false",
            )
        ) from error


def place(model: PreTrainedModel, world: World) -> None:
    """Bring a model that trains to its device, cut where models are; in place, once."""
    if world.tensor_mesh is not None:
        cut_over(model, world.tensor_mesh)
    model.to(world.device)


def shard(root: nn.Module, model: PreTrainedModel, world: World, *, dtype: torch.dtype) -> None:
    """Shard every decoder layer of a model and, as one more unit, all the rest; in place, once.

    The lm_head belongs to the unit of the `root`, whose forward encloses the fused loss: there the
    loss finds it gathered, and its gradient is reduced with that of the embedding. Gradients are
    summed, not averaged, for the loss is already divided by the tokens of all processes.
    """
    if world.mesh is None:
        return
    if world.tensor_mesh is not None:
        keep_whole(root, world.tensor_mesh)
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    units: list[nn.Module] = [*model.base_model.layers, root]
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
    and lm_head are whole on every device either way: the loss reads them. Where models are cut,
    this is said of the part that is this process's.
    """
    if world.tensor_mesh is not None:
        cut_over(model, world.tensor_mesh)
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
