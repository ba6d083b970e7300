"""Nemotron-4: squared-ReLU MLP without a gate, LayerNorm with bias, partial rotary embedding."""

from __future__ import annotations

from paretron.families.llama import ATTENTION, ATTENTION_BIAS, EMBED, HEAD, NORMS, L
from paretron.families.table import Family, Tensor

NEMOTRON = Family(
    "nemotron",
    "NemotronForCausalLM",
    (
        EMBED,
        *ATTENTION,
        *ATTENTION_BIAS,
        Tensor(L + "mlp.up_proj.weight", "ffn, hidden"),
        Tensor(L + "mlp.up_proj.bias", "ffn", when="mlp_bias"),
        Tensor(L + "mlp.down_proj.weight", "hidden, ffn"),
        Tensor(L + "mlp.down_proj.bias", "hidden", when="mlp_bias"),
        *NORMS,
        Tensor(L + "input_layernorm.bias", "hidden"),
        Tensor(L + "post_attention_layernorm.bias", "hidden"),
        *HEAD,
        Tensor("model.norm.bias", "hidden"),
    ),
    norm="layernorm",
    norm_offset=1.0,
    settings=("mlp_bias", "norm_eps", "partial_rotary_factor"),
)
