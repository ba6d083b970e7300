"""config.json in: only what is safe. config.json out: what every engine reads the same way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from makers import PicoMaker
from paretron.artifacts.allowed import allowed_keys
from paretron.artifacts.config import read_config, read_config_and_notices, relabel, servable_config
from paretron.artifacts.models import load_model
from paretron.artifacts.values import ACTIVATIONS, ROPE_TYPES
from paretron.errors import Code, ParetronError
from paretron.families import FAMILIES, explicit, family_of, sizes
from paretron.families.table import with_sizes

FAMILY_NAMES = ("llama", "mistral", "qwen2", "qwen3", "nemotron")
LLAMA3_SCALING = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}  # fmt: skip
BASE: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2,
    "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
}  # fmt: skip


def written(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def library(config: dict[str, Any]) -> Any:
    return type(AutoConfig.for_model(config["model_type"])).from_dict(dict(config))


def rope_of(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers understands of the rotary embedding, defaults and old names dropped."""
    parameters = dict(library(config).rope_parameters)
    parameters.pop("type", None)
    if parameters.get("partial_rotary_factor") == 1.0:
        del parameters["partial_rotary_factor"]
    return parameters


SPELLINGS: dict[str, dict[str, Any]] = {
    "both absent": {},
    "old theta": {"rope_theta": 500000.0},
    "new theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "new theta without type": {"rope_parameters": {"rope_theta": 500000.0}},
    "old scaling": {"rope_theta": 500000.0, "rope_scaling": LLAMA3_SCALING},
    "oldest scaling": {"rope_theta": 1e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "new scaling": {"rope_parameters": LLAMA3_SCALING | {"rope_theta": 500000.0}},
    "both": {
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_both_rope_spellings_say_the_same(spelling: str) -> None:
    config = BASE | SPELLINGS[spelling]
    out = servable_config(config, dtype="bfloat16")
    both = {"rope_parameters", "rope_theta", "rope_scaling"}
    assert both <= set(out)
    new = {k: v for k, v in out.items() if k not in ("rope_theta", "rope_scaling")}
    old = {k: v for k, v in out.items() if k != "rope_parameters"}
    assert rope_of(new) == rope_of(old) == rope_of(out) == rope_of(config)


def test_partial_rotary_factor_is_kept_in_both_places() -> None:
    config = BASE | {"model_type": "nemotron", "partial_rotary_factor": 0.5, "rope_theta": 1e4}
    out = servable_config(config, dtype="float32")
    assert out["partial_rotary_factor"] == out["rope_parameters"]["partial_rotary_factor"] == 0.5


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_what_every_engine_needs_is_stated(family: str, pico: PicoMaker) -> None:
    config = read_config(pico(family))
    del config["head_dim"]
    config |= {"hidden_size": 128, "num_attention_heads": 4}
    out = servable_config(config, dtype="bfloat16")
    # Qwen 3 means 128 by a head_dim that is not there, the others hidden / heads.
    assert out["head_dim"] == FAMILIES[family].absent.get("head_dim", 32)
    assert out["dtype"] == out["torch_dtype"] == "bfloat16"
    assert out["num_key_value_heads"] == 2
    assert out["tie_word_embeddings"] is False
    assert out["architectures"] == [FAMILIES[family].architecture]
    assert sizes(family_of(out), out) == sizes(FAMILIES[family], explicit(FAMILIES[family], config))
    assert json.loads(json.dumps(out, allow_nan=False)) == out


def test_the_input_is_not_changed() -> None:
    config = BASE | {"rope_scaling": dict(LLAMA3_SCALING), "hidden_size": 66}
    before = json.dumps(config)
    servable_config(config, dtype="float32")
    assert json.dumps(config) == before


def test_a_llama_that_llama_refuses_becomes_a_mistral_with_the_same_logits() -> None:
    config = BASE | {"hidden_size": 66, "rope_theta": 5e5, "attention_bias": False}
    with pytest.raises(Exception, match="multiple"):
        library(config)
    out = servable_config(config, dtype="float32")
    assert (out["model_type"], out["sliding_window"]) == ("mistral", None)
    assert "attention_bias" not in out
    # The same weights under both names, at a size that Llama takes as well.
    same = BASE | {"rope_theta": 5e5}
    llama = AutoModelForCausalLM.from_config(library(same)).eval()
    name = relabel(same | {"hidden_size": 66}) | {"hidden_size": 64}
    mistral = AutoModelForCausalLM.from_config(library(name)).eval()
    mistral.load_state_dict(llama.state_dict())
    ids = torch.arange(40)[None]
    assert torch.equal(llama(ids).logits, mistral(ids).logits)


def test_relabel_leaves_the_rest_alone() -> None:
    assert relabel(BASE) == BASE
    assert relabel(BASE | {"model_type": "qwen3", "hidden_size": 66})["model_type"] == "qwen3"


@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
def test_a_biased_llama_cannot_be_relabelled(bias: str) -> None:
    with pytest.raises(ParetronError) as caught:
        relabel(BASE | {"hidden_size": 66, bias: True})
    assert caught.value.problems[0].code is Code.UNSUPPORTED
    assert bias in caught.value.problems[0].where


CODE = {
    "auto_map": {"AutoModelForCausalLM": "evil.Model"},
    "trust_remote_code": True,
    "attn_implementation": "someone/kernel",
    "_attn_implementation": "someone/kernel",
    "_attn_implementation_internal": "someone/kernel",
    "_name_or_path": "someone/model",
    "experts_implementation": "someone/kernel",
}


@pytest.mark.parametrize("key", CODE)
def test_keys_that_name_code_are_left_out(key: str, pico: PicoMaker) -> None:
    folder = pico()
    config = read_config(folder)
    assert read_config(written(folder, config | {key: CODE[key]})) == config
    model = load_model(folder)
    assert model.config._attn_implementation in ("sdpa", "eager")
    assert key not in servable_config(read_config(folder), dtype="float32")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tie_word_embeddings", "false"),
        ("tie_word_embeddings", 1),
        ("attention_bias", "no"),
        ("rope_theta", "1e4"),
        ("rope_theta", True),
        ("rope_scaling", "llama3"),
        ("rope_parameters", []),
        ("rope_parameters", {"rope_theta": "x"}),
        ("partial_rotary_factor", [0.5]),
        ("quantization_config", {"quant_method": "fp8"}),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(key: str, value: object, tmp_path: Path) -> None:
    with pytest.raises(ParetronError) as caught:
        read_config(written(tmp_path / "m", BASE | {key: value}))
    (problem,) = caught.value.problems
    assert problem.code is Code.INPUT_CONFIG
    assert problem.fix
    assert problem.where.startswith("config.json: ")


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"a": NaN}', '{"a": 1e400}', '{"a": 1, "a": 2}', "\xff"]
)
def test_a_config_that_is_no_json(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ParetronError) as caught:
        read_config(tmp_path)
    assert caught.value.problems[0].code is Code.INPUT_CONFIG
    assert caught.value.problems[0].fix


@pytest.mark.parametrize(
    "change",
    [{"rms_norm_eps": "small"}, {"use_cache": "x"}, {"id2label": [1]}],
    ids=str,
)
def test_what_only_the_library_refuses(change: dict[str, Any], pico: PicoMaker) -> None:
    folder = pico()
    written(folder, read_config(folder) | change)
    with pytest.raises(ParetronError, match="transformers refuses it"):
        load_model(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_key_of_the_library_is_lost(family: str) -> None:
    """All that a model's own class writes is known, but for its private notes."""
    written = type(AutoConfig.for_model(family))().to_dict()
    assert {k for k in written if not k.startswith("_")} <= allowed_keys(FAMILIES[family])


def test_an_unknown_key_is_left_out_and_said_once(pico: PicoMaker) -> None:
    folder = pico()
    config = read_config(folder)
    written(folder, config | {"gate": 1, "_made_up": 2, "auto_map": {}, "nothing": None})
    kept, notices = read_config_and_notices(folder)
    assert kept == config
    assert notices == ("config.json: left out _made_up, auto_map, gate",)


def test_an_unknown_list_with_an_entry_a_layer_stays_to_be_seen(pico: PicoMaker) -> None:
    """It must keep layers from being removed, which its entries would no longer fit."""
    folder = pico()
    written(folder, read_config(folder) | {"windows": [1, 2, 3, 4], "others": [1, 2]})
    kept, notices = read_config_and_notices(folder)
    assert kept["windows"] == [1, 2, 3, 4]
    assert notices == ("config.json: left out others",)
    size = sizes(family_of(kept), kept)
    with pytest.raises(ParetronError, match="one a layer"):
        with_sizes(family_of(kept), kept, size | {"layers": 3}, kept_layers=(0, 1, 2))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**6) | st.floats(allow_nan=False,
    allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2)
    | st.dictionaries(st.sampled_from(["rope_type", "type", "factor", "rope_theta"]), inner),
    max_leaves=4,
)  # fmt: skip
KEYS = (*BASE, "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor",
        "tie_word_embeddings", "attention_bias", "quantization_config", "layer_types")  # fmt: skip


@given(st.sampled_from(FAMILY_NAMES), st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4))
def test_any_config_is_served_or_refused_in_our_words(family: str, change: dict[str, Any]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        try:
            config = read_config(written(Path(folder), BASE | {"model_type": family} | change))
            out = servable_config(config, dtype="float32")
        except ParetronError as error:
            assert error.exit_code in (3, 6)
        else:
            assert sizes(family_of(out), out) == sizes(family_of(config), config)
            json.dumps(out, allow_nan=False)


def test_names_that_engines_look_up_are_the_librarys() -> None:
    assert set(ACTIVATIONS) <= set(ACT2FN)
    assert set(ROPE_INIT_FUNCTIONS) <= set(ROPE_TYPES)
