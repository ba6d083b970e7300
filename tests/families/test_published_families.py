"""Published models of further families: the configs as their authors wrote them, counted exactly.

Each count is that of the very model transformers makes from the config, without its weights.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from paretron.families import expected_tensors, explicit, family_of, parameter_counts

MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "gemma-2-2b": (2614341888, {
        "model_type": "gemma2", "vocab_size": 256000, "hidden_size": 2304,
        "num_hidden_layers": 26, "intermediate_size": 9216, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 256,
    }),
    "gemma-3-1b": (999885952, {
        "model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 1152,
        "num_hidden_layers": 26, "intermediate_size": 6912, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512,
        "sliding_window_pattern": 6,
    }),
    "Phi-3-mini-4k": (3821079552, {
        "model_type": "phi3", "vocab_size": 32064, "hidden_size": 3072,
        "num_hidden_layers": 32, "intermediate_size": 8192, "num_attention_heads": 32,
        "num_key_value_heads": 32,
    }),
    "OLMo-2-7B": (7298617344, {
        "model_type": "olmo2", "vocab_size": 100352, "hidden_size": 4096,
        "num_hidden_layers": 32, "intermediate_size": 11008, "num_attention_heads": 32,
        "num_key_value_heads": 32,
    }),
    "granite-3.1-2b": (2533531648, {
        "model_type": "granite", "vocab_size": 49155, "hidden_size": 2048,
        "num_hidden_layers": 40, "intermediate_size": 8192, "num_attention_heads": 32,
        "num_key_value_heads": 8, "tie_word_embeddings": True,
    }),
    "starcoder2-3b": (3030371328, {
        "model_type": "starcoder2", "vocab_size": 49152, "hidden_size": 3072,
        "num_hidden_layers": 30, "intermediate_size": 12288, "num_attention_heads": 24,
        "num_key_value_heads": 2, "use_bias": True,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_counts_are_those_of_the_published_model(name: str) -> None:
    total, config = MODELS[name]
    family = family_of(config)
    said = explicit(family, config)
    assert parameter_counts(family, said).total == total
    ids = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**(config | ids)))
    assert sum(p.numel() for p in model.parameters()) == total
    made = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert expected_tensors(family, said) == made
