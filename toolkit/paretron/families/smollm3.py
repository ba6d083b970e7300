"""SmolLM 3: Llama of which some layers do without the rotary embedding, as a list says."""

from __future__ import annotations

from dataclasses import replace

from paretron.families.llama import LLAMA

SMOLLM3 = replace(
    LLAMA,
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    hidden_multiple_of_heads=False,
    absent={"tie_word_embeddings": True},
    per_layer_lists=("layer_types", "no_rope_layers"),
    settings=("max_window_layers", "mlp_bias", "no_rope_layer_interval", "no_rope_layers"),
)
