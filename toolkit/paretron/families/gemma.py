"""Gemma 2 and Gemma 3 (text): four norms a layer, scaled embeddings, local and global layers."""

from __future__ import annotations

from dataclasses import replace

from paretron.families.llama import ATTENTION_BIAS, CORE, L
from paretron.families.table import Family, Tensor

# The norm over what attention writes, and the norm over what the MLP writes.
POST_NORMS = (
    ("self_attn.o_proj.weight", "post_attention_layernorm.weight"),
    ("mlp.down_proj.weight", "post_feedforward_layernorm.weight"),
)

GEMMA2 = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    (
        *CORE,
        *ATTENTION_BIAS,
        Tensor(L + "pre_feedforward_layernorm.weight", "hidden"),
        Tensor(L + "post_feedforward_layernorm.weight", "hidden"),
    ),
    norm_offset=1.0,
    post_norms=POST_NORMS,
    embedding_scale_by_hidden=True,
    logit_softcap="final_logit_softcapping",
    attention_softcap="attn_logit_softcapping",
    activation="hidden_activation",
    hidden_multiple_of_heads=True,
    absent={
        "tie_word_embeddings": True, "head_dim": 256, "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    full_attention_every=2,
    settings=(
        "attn_logit_softcapping", "cache_implementation", "final_logit_softcapping",
        "hidden_activation", "query_pre_attn_scalar", "use_bidirectional_attention",
    ),
)  # fmt: skip
GEMMA3 = replace(
    GEMMA2,
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    tensors=(
        *GEMMA2.tensors,
        Tensor(L + "self_attn.q_norm.weight", "head_dim"),
        Tensor(L + "self_attn.k_norm.weight", "head_dim"),
    ),
    attention_softcap="",  # its attention has no cap, whatever a config says
    rope_local_base="rope_local_base_freq",
    absent={
        "tie_word_embeddings": True, "head_dim": 256, "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
    },
    full_attention_every=6,
    settings=(*GEMMA2.settings, "rope_local_base_freq", "sliding_window_pattern"),
)  # fmt: skip
