"""StarCoder 2: LayerNorm with bias, biases on every matrix, an MLP without a gate."""

from __future__ import annotations

from paretron.families.llama import ATTENTION, EMBED, HEAD, KV, NORMS, L, Q
from paretron.families.table import Family, Tensor

STARCODER2 = Family(
    "starcoder2",
    "Starcoder2ForCausalLM",
    (
        EMBED,
        *ATTENTION,
        Tensor(L + "self_attn.q_proj.bias", Q, when="use_bias"),
        Tensor(L + "self_attn.k_proj.bias", KV, when="use_bias"),
        Tensor(L + "self_attn.v_proj.bias", KV, when="use_bias"),
        Tensor(L + "self_attn.o_proj.bias", "hidden", when="use_bias"),
        Tensor(L + "mlp.c_fc.weight", "ffn, hidden"),
        Tensor(L + "mlp.c_fc.bias", "ffn", when="use_bias"),
        Tensor(L + "mlp.c_proj.weight", "hidden, ffn"),
        Tensor(L + "mlp.c_proj.bias", "hidden", when="use_bias"),
        *NORMS,
        Tensor(L + "input_layernorm.bias", "hidden"),
        Tensor(L + "post_attention_layernorm.bias", "hidden"),
        *HEAD,
        Tensor("model.norm.bias", "hidden"),
    ),
    norm="layernorm",
    absent={"tie_word_embeddings": True, "use_bias": True},
    settings=(
        "activation_function", "attention_softmax_in_fp32", "embedding_dropout", "mlp_type",
        "norm_epsilon", "norm_type", "residual_dropout", "scale_attention_softmax_in_fp32",
        "scale_attn_weights", "use_bias",
    ),
)  # fmt: skip
