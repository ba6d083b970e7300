"""The criterion `taylor`: what the loss would change, to first order, without a unit's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from paretron.artifacts.held import held_parameters
from paretron.errors import Code, ParetronError, Problem
from paretron.families import placed_tensors
from paretron.importance.criteria.material import Importance, Material
from paretron.importance.criteria.units import UnitSums
from paretron.importance.executor import Batch, LayerStack

_LOGITS_AT_ONCE = 1 << 24  # bounds memory, whatever the vocabulary
_WEIGHTS_AT_ONCE = 1 << 22


def taylor(material: Material) -> Importance:
    """The sum of |w dL/dw| over all weights w that carry a unit, and over those of a layer.

    L is the mean next-token loss over all samples of all processes: gradients are summed over them
    before the absolute value, so batches and processes do not matter. (LLM-Pruner, arXiv
    2305.11627, equation 5 at first order: element-wise importance, aggregated over the group by
    summation; layers: "Taylor" of Shortened LLaMA, arXiv 2402.02834, without its rule that some
    first and last layers always stay.) The model is in memory, and a gradient in fp32 for every
    weight. Errors: INPUT_CORPUS when no token follows another, GATE_NONFINITE and INPUT_FAMILY
    naming a tensor whose gradient is NaN or infinite, or that no gradient reaches.
    """
    stack, checkpoint = material.stack, material.checkpoint
    own = float(sum(batch.num_targets for batch in material.batches))
    targets = float(material.total(torch.tensor(own, dtype=torch.float64)))
    if not targets:
        raise ParetronError(
            Problem(
                Code.INPUT_CORPUS,
                "samples of one token: a gradient needs a token and one before it",
                where="data.calibration.seq_len",
                fix="at least 2",
            )
        )
    with _gradients(stack.model) as gradients:
        for batch in material.batches:
            if batch.num_targets:
                _backward(stack, batch)
    sums = UnitSums(checkpoint.family, checkpoint.config)
    layers = torch.zeros(len(stack), dtype=torch.float64)
    places = {p.name: p for p in placed_tensors(checkpoint.family, checkpoint.config)}
    parameters = dict(stack.model.named_parameters())
    for held in held_parameters(checkpoint.family, checkpoint.config):
        weight = parameters[held.name].detach()
        found = gradients.pop(held.name, None) if own else torch.zeros_like(weight).float()
        gradient = _whole(held.name, found, material.total) / targets
        for (name, w), (_, g) in zip(held.to_disk(weight), held.to_disk(gradient), strict=True):
            for first, part in _row_products(w, g):
                sums.add(places[name], first, part)
                if (layer := places[name].layer) is not None:
                    layers[layer] += part.sum().cpu()
    return Importance(sums.units, layers)


@contextmanager
def _gradients(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """While open, gradients of every backward pass are summed up here, in fp32, by name."""
    sums: dict[str, torch.Tensor] = {}

    def collect(name: str, parameter: torch.Tensor) -> None:
        if name not in sums:
            sums[name] = torch.zeros_like(parameter, dtype=torch.float32)
        if parameter.grad is not None:
            sums[name] += parameter.grad
            parameter.grad = None

    handles = [
        p.register_post_accumulate_grad_hook(lambda parameter, n=n: collect(n, parameter))
        for n, p in model.named_parameters()
    ]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


@torch.enable_grad()
def _backward(stack: LayerStack, batch: Batch) -> None:
    """The gradients of a batch's summed loss; logits exist for a few rows at a time."""
    prepared = stack.prepare(batch.ids_BT)
    hidden = prepared.hidden_BTD
    for i in range(len(stack)):
        hidden = stack.run_layer(i, prepared, hidden)
    states_ND = stack.final_norm(hidden)[:, :-1].flatten(0, 1)
    targets_N = batch.targets().flatten().to(stack.device)
    read = states_ND.detach().requires_grad_()
    rows = max(1, _LOGITS_AT_ONCE // int(stack.model.config.vocab_size))
    for part, targets in zip(read.split(rows), targets_N.split(rows), strict=True):
        loss = nn.functional.cross_entropy(stack.logits(part), targets, reduction="sum")
        torch.autograd.backward(loss)
    torch.autograd.backward(states_ND, read.grad)


def _row_products(
    weight: torch.Tensor, gradient: torch.Tensor
) -> Iterator[tuple[int, torch.Tensor]]:
    """|w g| in fp64, a block of rows at a time, each with its first row's number."""
    rows = max(1, _WEIGHTS_AT_ONCE // max(1, weight[0].numel()))
    for first in range(0, len(weight), rows):
        w, g = weight[first : first + rows], gradient[first : first + rows]
        yield first, (w.double() * g.double()).abs()


def _whole(
    name: str, gradient: torch.Tensor | None, total: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """The gradient over all processes' samples, refused where it is none."""
    if gradient is None:
        raise ParetronError(
            Problem(
                Code.INPUT_FAMILY,
                "no gradient reaches it, so there is nothing to score",
                where=name,
                fix="score by another criterion",
            )
        )
    found = total(gradient)
    if not bool(torch.isfinite(found).all()):
        raise ParetronError(
            Problem(
                Code.GATE_NONFINITE,
                "its gradient is NaN or infinite",
                where=name,
                fix="check the checkpoint's weights, or score by another criterion",
            )
        )
    return found
