"""What work costs, from the table's matrices alone.

A matrix product of an m x n weight costs 2mn FLOPs a token, where the token passes it: of experts,
those that it is routed to. The embedding is a lookup, a tied head is not. Causal attention adds,
for each layer, 4 * heads * head_dim FLOPs a token for each position that it sees, half the context
on average. A backward pass costs twice its forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paretron.families.counts import active_matrix_weights
from paretron.families.table import Family, sizes

ADAM_BYTES_PER_PARAM = 16  # fp32 weight, gradient and two moments
CHECKPOINT_BYTES_PER_PARAM = 12  # fp32 weight and two moments


def matrix_flops_per_token(family: Family, config: Mapping[str, Any]) -> int:
    """FLOPs of a forward pass in the layers' matrices and the lm_head, for one token."""
    size = sizes(family, config)
    return 2 * (size["vocab"] * size["hidden"] + active_matrix_weights(family, config))


def attention_flops_per_token_and_position(family: Family, config: Mapping[str, Any]) -> int:
    """FLOPs of a forward pass in attention, for one token and one position that it sees."""
    size = sizes(family, config)
    return 4 * size["layers"] * size["kv_heads"] * size["q_per_kv"] * size["head_dim"]


def forward_flops_per_token(family: Family, config: Mapping[str, Any], *, seq_len: int) -> int:
    """FLOPs of a forward pass for one token of a window of `seq_len`, on average."""
    attention = attention_flops_per_token_and_position(family, config) * seq_len // 2
    return matrix_flops_per_token(family, config) + attention
