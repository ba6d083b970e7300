"""Mixtures of experts by their config alone: counts, which layers have experts, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from paretron.errors import Code, ParetronError
from paretron.families import (
    FAMILIES,
    expected_tensors,
    explicit,
    family_of,
    parameter_counts,
    placed_tensors,
    sizes,
)
from paretron.families.experts import is_moe_layer
from paretron.families.table import with_sizes
from paretron.plan.cost import model_facts

MIXTRAL_8X7B: dict[str, Any] = {
    "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
    "num_local_experts": 8, "num_experts_per_tok": 2, "tie_word_embeddings": False,
}  # fmt: skip
QWEN3_30B_A3B: dict[str, Any] = {
    "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
    "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts_per_tok": 8,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "tie_word_embeddings": False,
}  # fmt: skip
PUBLISHED = {"mixtral": (MIXTRAL_8X7B, 46702792704), "qwen3_moe": (QWEN3_30B_A3B, 30532122624)}
SMALL = QWEN3_30B_A3B | {"num_hidden_layers": 6, "num_experts": 4, "num_experts_per_tok": 2}


def _layer_without_experts(c: dict[str, Any]) -> int:
    """Attention, norms and router, by plain arithmetic."""
    hidden, heads, kv = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"]
    attention = 2 * hidden * 128 * (heads + kv)
    router = hidden * (c.get("num_experts") or c["num_local_experts"])
    head_norms = 2 * 128 if c["model_type"] == "qwen3_moe" else 0
    return attention + router + 2 * hidden + head_norms


@pytest.mark.parametrize("family", PUBLISHED)
def test_counts_of_published_models(family: str) -> None:
    config, total = PUBLISHED[family]
    counts = parameter_counts(FAMILIES[family], config)
    assert counts.total == total
    ffn = config.get("moe_intermediate_size") or config["intermediate_size"]
    layers, hidden, vocab = (config[k] for k in ("num_hidden_layers", "hidden_size", "vocab_size"))
    expert = 3 * hidden * ffn
    active = layers * (_layer_without_experts(config) + config["num_experts_per_tok"] * expert)
    active += 2 * vocab * hidden + hidden
    assert counts.active == active
    facts = model_facts(config, dtype="BF16")
    assert facts.as_json()["active_params"] == active
    norms = layers * (2 * hidden + (2 * 128 if family == "qwen3_moe" else 0)) + hidden
    assert facts.forward_flops_per_token == 2 * (active - vocab * hidden - norms)


@pytest.mark.parametrize("family", PUBLISHED)
def test_counts_are_those_of_transformers(family: str) -> None:
    config, total = PUBLISHED[family]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    assert sum(p.numel() for p in model.parameters()) == total


def test_a_model_without_experts_is_active_whole() -> None:
    config = {k: v for k, v in MIXTRAL_8X7B.items() if "experts" not in k}
    counts = parameter_counts(FAMILIES["llama"], config | {"model_type": "llama"})
    assert counts.active == counts.total


@pytest.mark.parametrize(
    ("rule", "dense"),
    [
        ({}, []),
        ({"mlp_only_layers": [1, 4]}, [1, 4]),
        ({"decoder_sparse_step": 2}, [0, 2, 4]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, [0, 1, 2, 4]),
        ({"mlp_only_layers": None}, []),
    ],
)
def test_layers_without_experts(rule: dict[str, Any], dense: list[int]) -> None:
    config = SMALL | rule
    family = FAMILIES["qwen3_moe"]
    names = expected_tensors(family, config)
    plain = [i for i in range(6) if f"model.layers.{i}.mlp.up_proj.weight" in names]
    routed = [i for i in range(6) if f"model.layers.{i}.mlp.gate.weight" in names]
    last = [i for i in range(6) if f"model.layers.{i}.mlp.experts.3.down_proj.weight" in names]
    assert (plain, routed) == (dense, [i for i in range(6) if i not in dense])
    assert last == routed
    assert ("ffn" in sizes(family, config)) == bool(dense)
    assert [p.name for p in placed_tensors(family, config)] == list(names)
    shapes = sum(torch.Size(s).numel() for s in names.values())
    assert parameter_counts(family, config).total == shapes


def test_a_model_whose_layers_all_lack_experts() -> None:
    size = sizes(FAMILIES["qwen3_moe"], SMALL | {"mlp_only_layers": [0, 1, 2, 3, 4, 5]})
    assert {"experts", "moe_ffn"} & size.keys() == set()
    assert size["ffn"] == 6144


def test_dropped_layers_renumber_those_without_experts() -> None:
    config = SMALL | {"decoder_sparse_step": 2, "mlp_only_layers": [3]}
    family = FAMILIES["qwen3_moe"]
    kept = (1, 2, 3, 5)
    new = with_sizes(family, config, sizes(family, config) | {"layers": 4}, kept_layers=kept)
    assert (new["decoder_sparse_step"], new["mlp_only_layers"]) == (1, [1, 2])
    assert [is_moe_layer(new, i) for i in range(4)] == [is_moe_layer(config, i) for i in kept]


@pytest.mark.parametrize("value", [0, 5, "2", None, True, 2.0, [2]], ids=repr)
@pytest.mark.parametrize("model", ["mixtral", "qwen3_moe"])
def test_experts_per_token_are_between_one_and_all(model: str, value: object) -> None:
    config = PUBLISHED[model][0] | {"num_experts_per_tok": value}
    config |= {"num_experts": 4} if model == "qwen3_moe" else {"num_local_experts": 4}
    with pytest.raises(ParetronError) as caught:
        sizes(family_of(config), config)
    (problem,) = caught.value.problems
    assert problem.code is Code.INPUT_CONFIG
    assert "num_experts_per_tok" in problem.where


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mlp_only_layers", [6]),
        ("mlp_only_layers", [-1]),
        ("mlp_only_layers", "1"),
        ("mlp_only_layers", [True]),
        ("decoder_sparse_step", 0),
        ("decoder_sparse_step", None),
        ("decoder_sparse_step", 1.0),
        ("num_experts", 0),
        ("num_experts", 1 << 30),
        ("moe_intermediate_size", -1),
        ("num_local_experts", 5),
    ],
)
def test_absurd_values_are_named(key: str, value: object) -> None:
    config = SMALL | {key: value}
    with pytest.raises(ParetronError) as caught:
        sizes(family_of(config), config)
    (problem,) = caught.value.problems
    assert problem.code is Code.INPUT_CONFIG
    assert problem.where in (f"config.json: {key}", "config.json: num_experts")
    assert problem.fix


def test_more_names_than_fit_in_memory_are_refused() -> None:
    config = SMALL | {"num_hidden_layers": 4096, "num_experts": 4096}
    with pytest.raises(ParetronError, match="4096 layers of 4096 experts"):
        expected_tensors(family_of(config), config)


def test_either_spelling_of_the_number_of_experts() -> None:
    family = FAMILIES["qwen3_moe"]
    other = {k: v for k, v in SMALL.items() if k != "num_experts"} | {"num_local_experts": 4}
    assert sizes(family, other) == sizes(family, SMALL)
    for config in (other, SMALL):
        said = explicit(family, config)
        assert said["num_experts"] == said["num_local_experts"] == 4


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)
KEYS = [k for k in (*SMALL, "num_local_experts") if k != "model_type"]


@given(st.sampled_from(sorted(PUBLISHED)), st.dictionaries(st.sampled_from(KEYS), JSON))
def test_any_config_gives_counts_or_an_error_of_ours(model: str, changes: dict[str, Any]) -> None:
    config = SMALL | {"model_type": model} | changes
    try:
        family = family_of(config)
        assert parameter_counts(family, config).total > 0
        if config["num_hidden_layers"] < 100 and sizes(family, config).get("experts", 1) < 100:
            assert all(d > 0 for s in expected_tensors(family, config).values() for d in s)
    except ParetronError as error:
        assert error.exit_code == 3
