"""A config is believed only after each of its sizes has been looked at."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paretron.errors import Code, ParetronError
from paretron.families import FAMILIES, expected_tensors, family_of, parameter_counts, sizes

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
ABSURD = [-1, 0, "4096", 4096.0, True, 10**9, 10**400, float("inf"), float("nan"), [64], {}]


@pytest.mark.parametrize("value", [None, *ABSURD], ids=lambda v: f"{v!r:.12}")
@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "intermediate_size",
        "num_attention_heads",
    ],
)
def test_an_absurd_size_is_named(key: str, value: object) -> None:
    config = CONFIG | {key: value}
    with pytest.raises(ParetronError) as caught:
        sizes(family_of(config), config)
    (problem,) = caught.value.problems
    assert problem.code is Code.INPUT_CONFIG
    assert key in problem.where
    assert problem.fix


@pytest.mark.parametrize("value", ABSURD, ids=lambda v: f"{v!r:.12}")
@pytest.mark.parametrize("key", ["num_key_value_heads", "head_dim"])
def test_an_optional_size_may_be_absent_but_not_absurd(key: str, value: object) -> None:
    config = CONFIG | {key: value}
    with pytest.raises(ParetronError, match=key):
        sizes(family_of(config), config)


def test_what_absent_sizes_mean() -> None:
    config = {k: v for k, v in CONFIG.items() if k not in ("num_key_value_heads", "head_dim")}
    found = sizes(FAMILIES["llama"], config)
    assert (found["kv_heads"], found["q_per_kv"], found["head_dim"]) == (4, 1, 16)
    assert sizes(FAMILIES["llama"], config | {"head_dim": None}) == found


def test_heads_that_do_not_divide() -> None:
    config = CONFIG | {"num_key_value_heads": 3}
    with pytest.raises(ParetronError, match="4 attention heads do not divide over 3"):
        sizes(FAMILIES["llama"], config)


def test_head_dim_is_not_guessed_from_a_fraction() -> None:
    config = {k: v for k, v in CONFIG.items() if k != "head_dim"} | {"hidden_size": 66}
    with pytest.raises(ParetronError, match="head_dim"):
        sizes(FAMILIES["llama"], config)


@pytest.mark.parametrize(
    ("model_type", "closest"),
    [("lama", "llama"), ("qwen2_5", "qwen2"), ("mixtrl", "mixtral"), ("bert", None), (None, None),
     (7, None), (["llama"], None)],
)  # fmt: skip
def test_an_unsupported_family_names_the_supported(model_type: object, closest: str | None) -> None:
    with pytest.raises(ParetronError) as caught:
        family_of(CONFIG | {"model_type": model_type})
    (problem,) = caught.value.problems
    assert problem.code is Code.INPUT_FAMILY
    assert all(name in problem.fix for name in FAMILIES)
    assert closest is None or f"closest is {closest}" in problem.fix


@pytest.mark.parametrize(
    "architectures", [["MistralForCausalLM"], ["LlamaModel"], [], "LlamaForCausalLM", {"a": 1}]
)
def test_a_wrong_architecture_is_refused(architectures: object) -> None:
    with pytest.raises(ParetronError, match="architectures"):
        family_of(CONFIG | {"architectures": architectures})
    assert family_of(CONFIG | {"architectures": ["LlamaForCausalLM"]}) is FAMILIES["llama"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)


@given(st.sampled_from(sorted(FAMILIES)), st.dictionaries(st.sampled_from(sorted(CONFIG)), JSON))
def test_any_config_gives_counts_or_an_error_of_ours(model: str, changes: dict[str, Any]) -> None:
    config = CONFIG | {"model_type": model} | changes
    try:
        family = family_of(config)
        assert parameter_counts(family, config).total > 0
        if config["num_hidden_layers"] < 100:
            assert all(d > 0 for s in expected_tensors(family, config).values() for d in s)
    except ParetronError as error:
        assert error.exit_code == 3
