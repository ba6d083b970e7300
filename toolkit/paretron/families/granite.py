"""Granite: Llama with factors on embeddings, attention, residuals and logits."""

from __future__ import annotations

from dataclasses import replace

from paretron.families.llama import LLAMA

GRANITE = replace(
    LLAMA,
    model_type="granite",
    architecture="GraniteForCausalLM",
    logit_divisor="logits_scaling",
    hidden_multiple_of_heads=False,
    settings=(
        "attention_multiplier", "embedding_multiplier", "logits_scaling", "mlp_bias",
        "residual_multiplier",
    ),
)  # fmt: skip
