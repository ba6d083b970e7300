"""Llama, and Mistral, which differs in name alone."""

from __future__ import annotations

from paretron.families.table import Family, Tensor

L = "model.layers.{i}."
Q = "kv_heads*q_per_kv*head_dim"
KV = "kv_heads*head_dim"

EMBED = Tensor("model.embed_tokens.weight", "vocab, hidden")
ATTENTION = (
    Tensor(L + "self_attn.q_proj.weight", f"{Q}, hidden"),
    Tensor(L + "self_attn.k_proj.weight", f"{KV}, hidden"),
    Tensor(L + "self_attn.v_proj.weight", f"{KV}, hidden"),
    Tensor(L + "self_attn.o_proj.weight", f"hidden, {Q}"),
)
ATTENTION_BIAS = (
    Tensor(L + "self_attn.q_proj.bias", Q, when="attention_bias"),
    Tensor(L + "self_attn.k_proj.bias", KV, when="attention_bias"),
    Tensor(L + "self_attn.v_proj.bias", KV, when="attention_bias"),
    Tensor(L + "self_attn.o_proj.bias", "hidden", when="attention_bias"),
)
GATED_MLP = (
    Tensor(L + "mlp.gate_proj.weight", "ffn, hidden"),
    Tensor(L + "mlp.up_proj.weight", "ffn, hidden"),
    Tensor(L + "mlp.down_proj.weight", "hidden, ffn"),
)
MLP_BIAS = (
    Tensor(L + "mlp.gate_proj.bias", "ffn", when="mlp_bias"),
    Tensor(L + "mlp.up_proj.bias", "ffn", when="mlp_bias"),
    Tensor(L + "mlp.down_proj.bias", "hidden", when="mlp_bias"),
)
NORMS = (
    Tensor(L + "input_layernorm.weight", "hidden"),
    Tensor(L + "post_attention_layernorm.weight", "hidden"),
)
HEAD = (
    Tensor("model.norm.weight", "hidden"),
    Tensor("lm_head.weight", "vocab, hidden", when="untied"),
)

CORE = (EMBED, *ATTENTION, *GATED_MLP, *NORMS, *HEAD)

LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    (*CORE, *ATTENTION_BIAS, *MLP_BIAS),
    hidden_multiple_of_heads=True,
    settings=("mlp_bias", "pretraining_tp"),
)
MISTRAL = Family("mistral", "MistralForCausalLM", CORE)
