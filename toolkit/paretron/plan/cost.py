"""The numbers of a model that need no weights: counts, FLOPs, bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from paretron.families import Sizes, family_of, kv_bytes_per_token, parameter_counts, sizes
from paretron.families.costs import (
    attention_flops_per_token_and_position,
    matrix_flops_per_token,
)

BYTES_OF = {"F32": 4, "BF16": 2, "F16": 2, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ModelFacts:
    """The numbers of one model that need no weights; bytes are for `dtype`."""

    sizes: Sizes
    params: int
    active_params: int  # those that one token passes
    non_embedding_params: int
    dtype: str
    weight_bytes: int
    kv_bytes_per_token: int
    forward_flops_per_token: int
    attention_flops_per_token_and_position: int

    def forward_flops(self, *, tokens: int, seq_len: int) -> int:
        """FLOPs to run `tokens` tokens in windows of `seq_len` through the whole model."""
        attention = self.attention_flops_per_token_and_position * seq_len // 2
        return tokens * (self.forward_flops_per_token + attention)

    def as_json(self) -> dict[str, Any]:
        """The stable form in `plan --json`."""
        return {
            "sizes": dict(self.sizes),
            "params": self.params,
            "active_params": self.active_params,
            "non_embedding_params": self.non_embedding_params,
            "dtype": self.dtype,
            "weight_bytes": self.weight_bytes,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "flops": {
                "forward_per_token": self.forward_flops_per_token,
                "attention_per_token_and_position": self.attention_flops_per_token_and_position,
            },
        }


def model_facts(config: Mapping[str, Any], *, dtype: str) -> ModelFacts:
    """Counts and costs of a model from its config."""
    family = family_of(config)
    size = sizes(family, config)
    counts = parameter_counts(family, config)
    return ModelFacts(
        sizes=size,
        params=counts.total,
        active_params=counts.active,
        non_embedding_params=counts.non_embedding,
        dtype=dtype,
        weight_bytes=counts.total * BYTES_OF[dtype],
        kv_bytes_per_token=kv_bytes_per_token(family, config, bytes_per_value=BYTES_OF[dtype]),
        forward_flops_per_token=matrix_flops_per_token(family, config),
        attention_flops_per_token_and_position=attention_flops_per_token_and_position(
            family, config
        ),
    )
