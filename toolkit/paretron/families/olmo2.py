"""OLMo 2: norms after attention and MLP instead of before them, and over all heads at once.

The norms on query and key average over every head of a token, so a model without some heads is
not the model with those heads muted: their share of the mean goes too.
"""

from __future__ import annotations

from paretron.families.gemma import POST_NORMS
from paretron.families.llama import ATTENTION, ATTENTION_BIAS, EMBED, GATED_MLP, HEAD, KV, L, Q
from paretron.families.table import Family, Tensor

OLMO2 = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    (
        EMBED,
        *ATTENTION,
        *ATTENTION_BIAS,
        Tensor(L + "self_attn.q_norm.weight", Q),
        Tensor(L + "self_attn.k_norm.weight", KV),
        *GATED_MLP,
        Tensor(L + "post_attention_layernorm.weight", "hidden"),
        Tensor(L + "post_feedforward_layernorm.weight", "hidden"),
        *HEAD,
    ),
    post_norms=POST_NORMS,
)
