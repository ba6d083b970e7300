"""Phi-3 and Phi-4: Llama with query, key and value in one matrix, and gate and up in another."""

from __future__ import annotations

from paretron.families.llama import EMBED, HEAD, KV, NORMS, L, Q
from paretron.families.table import Family, Tensor

PHI3 = Family(
    "phi3",
    "Phi3ForCausalLM",
    (
        EMBED,
        Tensor(L + "self_attn.qkv_proj.weight", f"{Q} | {KV} | {KV}, hidden"),
        Tensor(L + "self_attn.o_proj.weight", f"hidden, {Q}"),
        Tensor(L + "mlp.gate_up_proj.weight", "ffn | ffn, hidden"),
        Tensor(L + "mlp.down_proj.weight", "hidden, ffn"),
        *NORMS,
        *HEAD,
    ),
    longrope_lists=True,
    settings=(
        "embd_pdrop", "full_attn_mod", "interpolate_factor", "lm_head_bias", "mlp_bias",
        "original_max_position_embeddings", "partial_rotary_factor", "resid_pdrop",
    ),
)  # fmt: skip
