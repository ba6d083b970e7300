"""A model's weights in the basis of its principal components: fewer channels are their front part.

A student whose hidden size is pruned by rotation (`paretron.compensate`) keeps the leading
components, whatever its size. Turned by the whole basis once, which changes nothing that
the model computes, the weights of all these students are slices of one set. Each norm's weight,
folded away, becomes one number, in closed form for every size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from paretron.artifacts.reader import Checkpoint
from paretron.compensate.basis import covariance_sum, principal_basis
from paretron.compensate.residual import final_norm, half_of, halves, role_of
from paretron.families import Family, Tensor, family_of
from paretron.importance.executor import Batch


@dataclass(frozen=True)
class Rotation:
    """The basis, rows [D, D] by the energy that they keep, and each norm's factor at every size.

    `factors[name]`, by the norm's name on disk, is [D]: entry k - 1 is for k channels.
    """

    basis: torch.Tensor
    factors: Mapping[str, torch.Tensor]

    def turned(
        self, tensor: torch.Tensor, row: Tensor, layer: int | None, checkpoint: Checkpoint
    ) -> torch.Tensor:
        """A weight of the checkpoint, cut on other axes or not, in the new basis; fp32."""
        role = role_of(checkpoint.family, row)
        basis, weight = self.basis, tensor.float()
        if role in ("reader", "head"):
            return weight * _gamma(checkpoint, row, layer) @ basis.T
        if role in ("embedding", "writer_bias"):
            return weight @ basis.T
        return basis @ weight if role == "writer" else weight

    def norm(self, name: str, channels: int, *, family: Family) -> torch.Tensor:
        """A norm's weight for so many channels, [channels]."""
        factor = float(self.factors[name][channels - 1])
        return torch.full((channels,), factor - family.norm_offset)


@torch.no_grad()
def principal_rotation(model: PreTrainedModel, batches: Sequence[Batch]) -> Rotation:
    """The rotation of a model of RMSNorms on these samples: two passes over them.

    Of a norm's input x with mean square 1, k components y = B_k x are kept; the norm makes
    z = y / rms(y) of them, and the factor s = sum <z, y> / sum |z|^2 = mean |y| / sqrt(k) brings
    z closest to y.
    """
    config = model.config.to_dict()
    names = tuple(_norms(family_of(config), config))
    size = int(model.config.hidden_size)
    covariance = torch.zeros((size, size), dtype=torch.float64)

    def add_square(_name: str, stream_ND: torch.Tensor) -> None:
        covariance.add_(covariance_sum(stream_ND, norm="rms"))

    _run(model, batches, names, add_square)
    basis = principal_basis(covariance, size, norm="rms")[0].float()
    sums = {name: torch.zeros(size, dtype=torch.float64) for name in names}
    roots = torch.arange(1, size + 1).sqrt()
    count = 0

    def add_lengths(name: str, stream_ND: torch.Tensor) -> None:
        nonlocal count
        count += len(stream_ND)
        energy = (stream_ND @ basis.T).square().cumsum(-1)
        x_energy = energy[:, -1:].clamp(min=torch.finfo(torch.float32).tiny)
        lengths = (energy / x_energy * size).sqrt()
        sums[name] += (lengths / roots).sum(0, dtype=torch.float64)

    _run(model, batches, names, add_lengths)
    return Rotation(basis, {n: (s * len(names) / count).float() for n, s in sums.items()})


def _run(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    names: Sequence[str],
    observe: Callable[[str, torch.Tensor], None],
) -> None:
    """Call `observe(norm, its input [N, D] in fp32 on the CPU)` for every norm and batch."""
    for batch in batches:
        with _watched(model, names, batch, observe):
            model.base_model(input_ids=batch.ids_BT.to(model.device), use_cache=False)


@contextmanager
def _watched(
    model: PreTrainedModel,
    names: Sequence[str],
    batch: Batch,
    observe: Callable[[str, torch.Tensor], None],
) -> Iterator[None]:
    def watch(name: str) -> Any:
        def hook(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            samples = zip(arguments[0], batch.lengths, strict=True)
            observe(name, torch.cat([x[:length] for x, length in samples]).float().cpu())

        module = model.get_submodule(name.removesuffix(".weight"))
        return module.register_forward_pre_hook(hook)

    handles = [watch(name) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _norms(family: Family, config: Mapping[str, Any]) -> Iterator[str]:
    """The names of all norms over the residual stream."""
    for i in range(int(config[family.config_keys["layers"]])):
        yield from (t.name.format(i=i) for t in family.rows(config, i) if t.is_norm)
    yield final_norm(family).name


def _gamma(checkpoint: Checkpoint, row: Tensor, layer: int | None) -> torch.Tensor:
    """What the norm that a matrix reads multiplies by, [D]."""
    family = checkpoint.family
    if layer is None:
        name = final_norm(family).name
    else:
        both = halves(family, checkpoint.config, layer)
        name = both[half_of(both, row)].norm.name.format(i=layer)
    return checkpoint.read(name).float() + family.norm_offset
