"""Qwen 2 (biases on query, key and value) and Qwen 3 (norms on query and key)."""

from __future__ import annotations

from dataclasses import replace

from paretron.families.llama import ATTENTION_BIAS, CORE, KV, L, Q
from paretron.families.table import Family, Tensor

QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    (
        *CORE,
        Tensor(L + "self_attn.q_proj.bias", Q),
        Tensor(L + "self_attn.k_proj.bias", KV),
        Tensor(L + "self_attn.v_proj.bias", KV),
    ),
    vllm_head_dim=False,
    full_attention_before="max_window_layers",
    settings=("max_window_layers", "use_mrope", "use_sliding_window"),
)
QWEN3 = replace(
    QWEN2,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    tensors=(
        *CORE,
        *ATTENTION_BIAS,
        Tensor(L + "self_attn.q_norm.weight", "head_dim"),
        Tensor(L + "self_attn.k_norm.weight", "head_dim"),
    ),
    vllm_head_dim=True,
    absent={"head_dim": 128},
)
