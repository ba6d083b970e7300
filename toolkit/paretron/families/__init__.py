"""Which tensors a model family has, and every axis of each: data only, no torch."""

from paretron.families.counts import Counts, expected_tensors, kv_bytes_per_token, parameter_counts
from paretron.families.registry import FAMILIES, family_of
from paretron.families.table import Family, Sizes, Tensor, sizes

__all__ = [
    "FAMILIES",
    "Counts",
    "Family",
    "Sizes",
    "Tensor",
    "expected_tensors",
    "family_of",
    "kv_bytes_per_token",
    "parameter_counts",
    "sizes",
]
