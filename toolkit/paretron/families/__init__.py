"""Which tensors a model family has, and every axis of each: data only, no torch."""

from paretron.families.absent import explicit
from paretron.families.counts import (
    Counts,
    Placed,
    active_matrix_weights,
    expected_tensors,
    kv_bytes_per_token,
    parameter_counts,
    placed_tensors,
)
from paretron.families.logits import PLAIN, LogitRule, logit_rule
from paretron.families.registry import FAMILIES, family_of
from paretron.families.table import Family, Sizes, Tensor, sizes

__all__ = [
    "FAMILIES",
    "PLAIN",
    "Counts",
    "Family",
    "LogitRule",
    "Placed",
    "Sizes",
    "Tensor",
    "active_matrix_weights",
    "expected_tensors",
    "explicit",
    "family_of",
    "kv_bytes_per_token",
    "logit_rule",
    "parameter_counts",
    "placed_tensors",
    "sizes",
]
