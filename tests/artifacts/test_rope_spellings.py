"""Rotary embeddings of several kinds of layers, and of long contexts, in both spellings."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from paretron.artifacts.config import relabel, servable_config
from paretron.errors import Code, ParetronError

BASE: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
FULL = {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5}
LOCAL = {"rope_type": "default", "rope_theta": 777.0}
OLD_GEMMA = {
    "rope_theta": 5e5, "rope_local_base_freq": 777.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}  # fmt: skip
LISTS = {"short_factor": [1.0] * 12, "long_factor": [2.0] * 12}


@pytest.mark.parametrize(
    "spelling",
    [OLD_GEMMA, {"rope_parameters": {"full_attention": FULL, "sliding_attention": LOCAL}}],
)
def test_two_kinds_of_layers_have_two_bases(spelling: dict[str, Any]) -> None:
    written = servable_config({"model_type": "gemma3_text", **BASE, **spelling}, dtype="float32")
    assert written["rope_parameters"] == {"full_attention": FULL, "sliding_attention": LOCAL}
    assert {k: written[k] for k in OLD_GEMMA} == OLD_GEMMA
    assert AutoConfig.for_model(**written).rope_parameters == written["rope_parameters"]
    assert servable_config(written, dtype="float32") == written


def test_gemma_without_a_word_on_rotary_embeddings() -> None:
    written = servable_config({"model_type": "gemma3_text", **BASE}, dtype="float32")
    library = AutoConfig.for_model("gemma3_text", **BASE)
    assert written["rope_parameters"] == library.rope_parameters
    assert (written["rope_theta"], written["rope_local_base_freq"]) == (1e6, 1e4)


@pytest.mark.parametrize("name", ["longrope", "su", "yarn"])
def test_long_contexts_keep_their_two_lists(name: str) -> None:
    config = {
        "model_type": "phi3", **BASE, "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 256, "rope_scaling": {"type": name, **LISTS},
    }  # fmt: skip
    written = servable_config(config, dtype="float32")
    # Exactly what the class of transformers 4 accepts.
    assert written["rope_scaling"] == {"type": "longrope", **LISTS}
    assert written["partial_rotary_factor"] == 0.75
    assert written["rope_parameters"]["rope_type"] == "longrope"
    library = AutoConfig.for_model(**written)
    assert {k: library.rope_parameters[k] for k in LISTS} == LISTS
    assert library.rope_parameters["original_max_position_embeddings"] == 256
    assert library.rope_parameters["partial_rotary_factor"] == 0.75


@pytest.mark.parametrize(
    ("config", "fix"),
    [
        ({"model_type": "gemma2", **BASE, "hidden_size": 126}, "multiple of 4"),
        ({"model_type": "gemma3_text", **BASE, "hidden_size": 126}, "multiple of 4"),
        ({"model_type": "phi3", **BASE, "num_attention_heads": 2,
          "rope_scaling": {"type": "longrope", **LISTS}}, "a hidden size of 64"),
    ],
)  # fmt: skip
def test_shapes_that_no_class_takes(config: dict[str, Any], fix: str) -> None:
    with pytest.raises(ParetronError) as caught:
        relabel(config)
    (problem,) = caught.value.problems
    assert problem.code is Code.UNSUPPORTED
    assert fix in problem.fix


@pytest.mark.parametrize("family", ["granite", "olmo2", "starcoder2", "phi3"])
def test_families_that_take_any_head_dim(family: str) -> None:
    config = {"model_type": family, **BASE, "hidden_size": 126}
    assert relabel(config) == config


def test_what_a_family_computes_with_is_left_alone() -> None:
    kept = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0}
    assert (
        kept.items()
        <= servable_config({"model_type": "granite", **BASE, **kept}, dtype="float32").items()
    )
    off = {"final_logit_softcapping": None, "query_pre_attn_scalar": 144}
    written = servable_config({"model_type": "gemma2", **BASE, **off}, dtype="float32")
    assert off.items() <= written.items()  # null switches the cap off: absent, it would be 30
    assert written["attn_logit_softcapping"] == 50.0
