"""What published configs leave out, and what the model's own class takes for it."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from paretron.errors import Code, ParetronError
from paretron.families import FAMILIES, PLAIN, LogitRule, explicit, family_of, logit_rule, sizes
from paretron.families.table import with_sizes

BASE: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 8, "intermediate_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
WINDOWED = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 5}


@pytest.mark.parametrize(
    ("family", "more"),
    [
        *((name, {}) for name in FAMILIES if name not in ("mixtral", "qwen3_moe")),
        ("gemma3_text", {"sliding_window_pattern": 3}),
        ("qwen2", WINDOWED),
        ("qwen3", WINDOWED | {"layer_types": None}),
    ],
)
def test_absent_keys_mean_what_the_library_takes(family: str, more: dict[str, Any]) -> None:
    config = {"model_type": family, **BASE, **more}
    said = explicit(FAMILIES[family], config)
    library = AutoConfig.for_model(family, **{k: v for k, v in config.items() if k != "model_type"})
    for key in ("tie_word_embeddings", "use_bias", "final_logit_softcapping", "layer_types"):
        taken = getattr(library, key, None)
        if key == "layer_types" and key not in said:
            assert not taken or set(taken) == {"full_attention"}
        else:
            assert said.get(key) == taken or (said.get(key) is None and not taken)
    own = getattr(library, "head_dim", None) or 64 // 4
    assert sizes(FAMILIES[family], said)["head_dim"] == own
    rule = logit_rule(FAMILIES[family], config)
    assert rule.softcap == getattr(library, FAMILIES[family].logit_softcap or "-", None)
    assert rule.divisor == getattr(library, FAMILIES[family].logit_divisor or "-", 1.0)


def test_a_pattern_of_layers_becomes_a_list_that_is_cut() -> None:
    family = FAMILIES["gemma3_text"]
    config = explicit(family, {"model_type": "gemma3_text", **BASE, "sliding_window_pattern": 3})
    kinds = config["layer_types"]
    assert [i for i, kind in enumerate(kinds) if kind == "full_attention"] == [2, 5]
    cut = with_sizes(family, config, sizes(family, config) | {"layers": 3}, kept_layers=(0, 2, 5))
    assert cut["layer_types"] == [kinds[0], kinds[2], kinds[5]]
    assert "sliding_window_pattern" not in cut  # the third layer left is no longer the global one


@pytest.mark.parametrize(
    ("family", "change", "key"),
    [
        ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern"),
        ("gemma3_text", {"sliding_window_pattern": "6"}, "sliding_window_pattern"),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types"),
        ("gemma2", {"layer_types": "full_attention"}, "layer_types"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("qwen2", WINDOWED | {"max_window_layers": -1}, "max_window_layers"),
    ],
)
def test_kinds_that_do_not_fit_are_named(family: str, change: dict[str, Any], key: str) -> None:
    config = {"model_type": family, **BASE, **change}
    with pytest.raises(ParetronError) as caught:
        explicit(family_of(config), config)
    assert caught.value.problems[0].code is Code.INPUT_CONFIG
    assert caught.value.problems[0].where == f"config.json: {key}"


@pytest.mark.parametrize("value", [0, -1.0, "30", True, float("nan"), float("inf"), [30.0]])
def test_caps_and_divisors_are_positive_numbers(value: object) -> None:
    for family, key in (("gemma2", "final_logit_softcapping"), ("granite", "logits_scaling")):
        with pytest.raises(ParetronError, match=key):
            logit_rule(FAMILIES[family], {key: value})


def test_a_cap_of_null_is_none() -> None:
    assert logit_rule(FAMILIES["gemma2"], {"final_logit_softcapping": None}) == PLAIN
    assert logit_rule(FAMILIES["gemma2"], {}) == LogitRule(softcap=30.0)
    assert logit_rule(FAMILIES["granite"], {"logits_scaling": 8}) == LogitRule(divisor=8.0)
