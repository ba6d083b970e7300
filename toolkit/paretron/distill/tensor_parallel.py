"""Models whose matrices are cut over the processes of a group, each with its share of every layer.

Which matrix is cut, and how, follows from the family's table (`families.cuts`). What flows between
the layers is whole in every process, so all of a group are given the same windows.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from transformers import PreTrainedModel

from paretron.distill.vocabulary import Shard as Rows
from paretron.families import family_of
from paretron.families.cuts import Cut, module_cuts


class Whole(ParallelStyle):
    """A module that every process has whole; `input_layout` says what of the input each has.

    Where that is a share, the gradients of the module's weights are summed over the processes.
    """

    def __init__(self, input_layout: Placement) -> None:
        super().__init__()
        self._layout = (input_layout,)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(
            module,
            device_mesh,
            input_fn=partial(_as_dtensor, self._layout),
            output_fn=_as_tensor,
        )


def cut_over(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Cut a model over the processes of `mesh`; in place, once, before anything else is done to it.

    Every process brings the same weights in host memory; its shares end on the mesh's device.
    """
    config = model.config.to_dict()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight is embedding.weight
    plan = {
        name: _style(model.get_submodule(name), cut)
        for name, cut in module_cuts(family_of(config), config).items()
    }
    parallelize_module(model, mesh, plan)
    if tied:
        head.weight = embedding.weight


def keep_whole(root: nn.Module, mesh: DeviceMesh) -> None:
    """Let every process of `mesh` have what was not cut: modules beside a model; in place.

    They read what is whole.
    """
    for module in list(root.modules()):
        if any(not isinstance(p, DTensor) for p in module.parameters(recurse=False)):
            parallelize_module(module, mesh, Whole(Replicate()))


def own_rows(head: nn.Linear) -> tuple[Tensor, Tensor | None, Rows | None]:
    """Weight and bias of an lm_head as this process has them, and which rows of how many."""
    weight, bias = head.weight, head.bias
    if not isinstance(weight, DTensor):
        return weight, bias, None
    own: Tensor = weight.to_local()
    start = weight.device_mesh.get_local_rank() * len(own)
    rows = Rows(weight.device_mesh.get_group(), start, start + len(own))
    return own, bias.to_local() if isinstance(bias, DTensor) else None, rows


def _style(module: nn.Module, cut: Cut) -> ParallelStyle:
    if cut == "rows":
        # Rows of an embedding are read by number, those of a linear write a share of the output.
        if isinstance(module, nn.Embedding):
            return RowwiseParallel(input_layouts=Replicate())
        return ColwiseParallel()
    if cut == "columns":
        return RowwiseParallel()
    # Heads do not meet in a norm over each: their number stands for that of windows.
    return Whole(Shard(0) if cut == "whole, of some heads" else Replicate())


def _as_dtensor(
    layout: tuple[Placement, ...], _: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh
) -> Any:
    first, *rest = inputs
    return DTensor.from_local(first, mesh, layout, run_check=False), *rest


def _as_tensor(_: nn.Module, output: DTensor, __: DeviceMesh) -> Any:
    return output.to_local()
