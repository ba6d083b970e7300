"""Mixtral and Qwen 3 MoE: experts in place of the MLP, and a router that chooses among them.

transformers holds the experts of a layer stacked, gate and up projection joined.
"""

from __future__ import annotations

from dataclasses import replace

from paretron.families.experts import PER_TOKEN, RULES
from paretron.families.llama import ATTENTION, ATTENTION_BIAS, EMBED, GATED_MLP, HEAD, NORMS, L
from paretron.families.table import DENSE_LAYER, MOE_LAYER, Family, Tensor

ROUTING = (PER_TOKEN, "output_router_logits", "router_aux_loss_coef")

M = L + "block_sparse_moe."
MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    (
        EMBED,
        *ATTENTION,
        Tensor(M + "gate.weight", "experts, hidden"),
        Tensor(M + "experts.{e}.w1.weight", "moe_ffn, hidden"),
        Tensor(M + "experts.{e}.w3.weight", "moe_ffn, hidden"),
        Tensor(M + "experts.{e}.w2.weight", "hidden, moe_ffn"),
        *NORMS,
        *HEAD,
    ),
    absent={"num_local_experts": 8, "num_experts_per_tok": 2},
    settings=(*ROUTING, "router_jitter_noise"),
    config_keys={
        "vocab": "vocab_size",
        "hidden": "hidden_size",
        "layers": "num_hidden_layers",
        "experts": "num_local_experts",
        "moe_ffn": "intermediate_size",
    },
    held={
        L + "mlp.gate.weight": (M + "gate.weight",),
        L + "mlp.experts.gate_up_proj": (
            M + "experts.{e}.w1.weight",
            M + "experts.{e}.w3.weight",
        ),
        L + "mlp.experts.down_proj": (M + "experts.{e}.w2.weight",),
    },
)

E = L + "mlp.experts.{e}."
QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    (
        EMBED,
        *ATTENTION,
        *ATTENTION_BIAS,
        Tensor(L + "self_attn.q_norm.weight", "head_dim"),
        Tensor(L + "self_attn.k_norm.weight", "head_dim"),
        *(replace(row, when=DENSE_LAYER) for row in GATED_MLP),
        Tensor(L + "mlp.gate.weight", "experts, hidden", when=MOE_LAYER),
        Tensor(E + "gate_proj.weight", "moe_ffn, hidden", when=MOE_LAYER),
        Tensor(E + "up_proj.weight", "moe_ffn, hidden", when=MOE_LAYER),
        Tensor(E + "down_proj.weight", "hidden, moe_ffn", when=MOE_LAYER),
        *NORMS,
        *HEAD,
    ),
    absent={"num_experts_per_tok": 8},
    settings=(*ROUTING, *RULES, "max_window_layers", "norm_topk_prob"),
    config_keys={
        "vocab": "vocab_size",
        "hidden": "hidden_size",
        "layers": "num_hidden_layers",
        "ffn": "intermediate_size",
        "experts": "num_experts",
        "moe_ffn": "moe_intermediate_size",
    },
    aliases={"num_local_experts": "num_experts"},
    held={
        L + "mlp.experts.gate_up_proj": (E + "gate_proj.weight", E + "up_proj.weight"),
        L + "mlp.experts.down_proj": (E + "down_proj.weight",),
    },
)
