"""config.json: read what is safe, write what every engine reads the same way.

The writing rules come from how engines misread configs: one that lacks `head_dim` is served as
hidden/heads, one that has only the new rope spelling is read by transformers 4 as theta 10000, and
`LlamaConfig` refuses a hidden size that is no multiple of the heads, where Mistral's does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paretron.artifacts.jsonfile import read_object
from paretron.errors import Code, ParetronError, Problem
from paretron.families import Family, family_of, sizes
from paretron.families.llama import MISTRAL

# Keys that name code to run, kernels from a hub included; a family table makes them unnecessary,
# so they are left out, as is every key that starts with an underscore.
CODE_KEYS = (
    "attn_implementation", "auto_map", "custom_pipelines", "experts_implementation",
    "trust_remote_code",
)  # fmt: skip

# What the keys that we read ourselves may hold, besides null.
_TYPES: Mapping[str, tuple[tuple[type, ...], str]] = {
    "tie_word_embeddings": ((bool,), "true or false"),
    "attention_bias": ((bool,), "true or false"),
    "mlp_bias": ((bool,), "true or false"),
    "rope_theta": ((int, float), "a number"),
    "partial_rotary_factor": ((int, float), "a number"),
    "rope_parameters": ((dict,), "an object"),
    "rope_scaling": ((dict,), "an object"),
}

DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a checkpoint folder, without keys that name code.

    Errors: INPUT_MISSING, INPUT_CONFIG, INPUT_FAMILY (no table covers its model_type).
    """
    path = folder / "config.json"
    if not path.is_file():
        cause = "no config.json here" if folder.is_dir() else "no such folder"
        raise ParetronError(
            Problem(
                Code.INPUT_MISSING,
                cause,
                where=str(folder),
                fix="name a folder with a Hugging Face checkpoint",
            )
        )
    config = read_object(path, code=Code.INPUT_CONFIG)
    sizes(family_of(config), config)
    _check_types(config)
    return {k: v for k, v in config.items() if k not in CODE_KEYS and not k.startswith("_")}


def _check_types(config: Mapping[str, Any]) -> None:
    if config.get("quantization_config") is not None:
        raise ParetronError(
            Problem(
                Code.INPUT_CONFIG,
                "the weights are quantised",
                where="config.json: quantization_config",
                fix="start from the checkpoint that was not quantised",
            )
        )
    groups = [config.get(name) for name in ("rope_parameters", "rope_scaling")]
    for part in (config, *(g for g in groups if isinstance(g, dict))):
        for key, (types, allowed) in _TYPES.items():
            value = part.get(key)
            # A bool is an int to Python, but no number to a config.
            wrong = not isinstance(value, types) or (isinstance(value, bool) and bool not in types)
            if value is not None and wrong:
                raise ParetronError(
                    Problem(
                        Code.INPUT_CONFIG,
                        f"{key} is {str(value)[:60]!r}",
                        where=f"config.json: {key}",
                        fix=allowed,
                    )
                )


def relabel(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config under a name whose class accepts its shape: Mistral where Llama refuses.

    Mistral is Llama without biases, so a biased Llama of such a shape is UNSUPPORTED.
    """
    out = dict(config)
    heads = config["num_attention_heads"]
    if config["model_type"] != "llama" or config["hidden_size"] % heads == 0:
        return out
    biased = [k for k in ("attention_bias", "mlp_bias") if config.get(k)]
    if biased:
        raise ParetronError(
            Problem(
                Code.UNSUPPORTED,
                f"hidden_size {config['hidden_size']} is not a multiple of {heads} heads, which "
                f"LlamaConfig refuses, and {biased[0]} rules out the Mistral name",
                where=f"config.json: {biased[0]}",
                fix=f"a hidden size that is a multiple of {heads}",
            )
        )
    for key in ("attention_bias", "mlp_bias", "pretraining_tp"):
        out.pop(key, None)
    return out | {
        "model_type": MISTRAL.model_type,
        "architectures": [MISTRAL.architecture],
        "sliding_window": None,
    }


def servable_config(config: Mapping[str, Any], *, dtype: str) -> dict[str, Any]:
    """The config as every engine reads it; `dtype` is a torch name such as "bfloat16"."""
    family = family_of(config)
    out = relabel({k: v for k, v in config.items() if v is not None or k in _NULL_MEANS})
    size = sizes(family, config)
    out.setdefault("architectures", [family.architecture])
    out["head_dim"] = size["head_dim"]
    out["num_key_value_heads"] = size["kv_heads"]
    out["tie_word_embeddings"] = bool(config.get("tie_word_embeddings", False))
    out |= _rope(config)
    out["dtype"] = out["torch_dtype"] = dtype
    return out


# null is not the default there: it switches the window off.
_NULL_MEANS = ("sliding_window",)


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Both spellings of the rotary embedding: `rope_parameters` and the older pair."""
    legacy = dict(config.get("rope_scaling") or {})
    if "type" in legacy:  # the oldest spelling of rope_type
        legacy.setdefault("rope_type", legacy.pop("type"))
    parameters = {"rope_type": "default"} | legacy | dict(config.get("rope_parameters") or {})
    parameters.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    if config.get("partial_rotary_factor") is not None:
        parameters.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
    not_scaling = ("rope_theta", "partial_rotary_factor")
    scaling = {k: v for k, v in parameters.items() if k not in not_scaling}
    out: dict[str, Any] = {
        "rope_parameters": parameters,
        "rope_theta": parameters["rope_theta"],
        "rope_scaling": None if scaling["rope_type"] == "default" else scaling,
    }
    if "partial_rotary_factor" in parameters:
        out["partial_rotary_factor"] = parameters["partial_rotary_factor"]
    return out


def family_and_config(folder: Path) -> tuple[Family, dict[str, Any]]:
    """Both at once, for what needs no weights."""
    config = read_config(folder)
    return family_of(config), config
