"""Experts observed while they run: what each adds to a token, and the neurons it adds it with.

The experts are run once, one after another, in the place of transformers' own way of running them.
Only tokens that are routed to an expert have values there; for all others they are zero and never
stored.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import nn
from torch.nn.functional import linear

_FORWARD = "forward"


class Experts(Protocol):
    """The experts of a layer as transformers holds them, E of each stacked.

    `gate_up_proj` is [E, 2 * moe_ffn, D], `down_proj` [E, D, moe_ffn].
    """

    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor
    act_fn: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Routed:
    """What one pass through the experts of a layer shows, for N tokens.

    `added_NE` is the norm of each expert's output times its routing weight, zero where a token is
    not routed to it. `neurons[e]` are the inputs of the expert's down projection, [n, moe_ffn], in
    the order of the n tokens that `routed_EN` names for it.
    """

    added_NE: torch.Tensor
    routed_EN: torch.Tensor
    neurons: tuple[torch.Tensor, ...]


@contextmanager
def watched(
    modules: Collection[nn.Module], note: Callable[[nn.Module, Routed], None]
) -> Iterator[None]:
    """While open, the modules run their experts one by one, and `note` hears of each pass."""
    with ExitStack() as stack:
        for module in modules:
            # Hides the class's own, which dispatches to an implementation by name.
            setattr(module, _FORWARD, _forward(module, note))
            stack.callback(delattr, module, _FORWARD)
        yield


def _forward(
    module: nn.Module, note: Callable[[nn.Module, Routed], None]
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    def forward(
        hidden_ND: torch.Tensor, experts_NK: torch.Tensor, weights_NK: torch.Tensor
    ) -> torch.Tensor:
        out, seen = run_experts(cast(Experts, module), hidden_ND, experts_NK, weights_NK)
        note(module, seen)
        return out

    return forward


def run_experts(
    own: Experts, hidden_ND: torch.Tensor, experts_NK: torch.Tensor, weights_NK: torch.Tensor
) -> tuple[torch.Tensor, Routed]:
    """The output of a layer's experts, [N, D], and what they show.

    `experts_NK` are the K experts of every token, `weights_NK` their weights.
    """
    count = len(own.down_proj)
    out_ND = torch.zeros_like(hidden_ND)
    exact = torch.promote_types(hidden_ND.dtype, torch.float32)
    added_NE = hidden_ND.new_zeros((len(hidden_ND), count), dtype=exact)
    routed_EN = torch.stack([(experts_NK == e).any(-1) for e in range(count)])
    neurons = []
    for e in range(count):
        token, choice = torch.where(experts_NK == e)
        gate, up = linear(hidden_ND[token], own.gate_up_proj[e]).chunk(2, dim=-1)
        inner = own.act_fn(gate) * up
        added = linear(inner, own.down_proj[e]) * weights_NK[token, choice, None]
        out_ND.index_add_(0, token, added.to(out_ND.dtype))
        added_NE[token, e] = torch.linalg.vector_norm(added, dim=-1, dtype=exact)
        neurons.append(inner)
    return out_ND, Routed(added_NE, routed_EN, tuple(neurons))
