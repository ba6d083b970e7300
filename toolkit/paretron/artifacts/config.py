"""config.json: read what is safe, write what every engine reads the same way.

The writing rules come from how engines misread configs: one that lacks `head_dim` is served as
hidden/heads, one that has only the new rope spelling is read by transformers 4 as theta 10000, and
`LlamaConfig` refuses a hidden size that is no multiple of the heads, where Mistral's does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paretron.artifacts.allowed import check_token_ids, clean_config
from paretron.artifacts.guard import inside
from paretron.artifacts.jsonfile import read_object
from paretron.artifacts.values import check_values
from paretron.errors import Code, ParetronError, Problem
from paretron.families import Family, explicit, family_of, logit_rule, sizes
from paretron.families.llama import MISTRAL

DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a checkpoint folder, its known keys alone.

    Errors: INPUT_MISSING, INPUT_CONFIG, INPUT_FAMILY (no table covers its model_type).
    """
    return read_config_and_notices(folder)[0]


def read_config_and_notices(folder: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The config like `read_config`, and one sentence on the keys that were left out."""
    path = inside(folder, "config.json") if folder.is_dir() else None
    if path is None:
        cause = "no config.json here" if folder.is_dir() else "no such folder"
        raise ParetronError(
            Problem(
                Code.INPUT_MISSING,
                cause,
                where=str(folder),
                fix="name a folder with a Hugging Face checkpoint",
            )
        )
    found = read_object(path, code=Code.INPUT_CONFIG)
    family = family_of(found)
    config = explicit(family, found)
    logit_rule(family, config)
    check_values(family, config)
    size = sizes(family, config)
    _check_lists(family, config, layers=size["layers"])
    check_token_ids(config, vocab=size["vocab"], file="config.json", code=Code.INPUT_CONFIG)
    return clean_config(config, family, layers=size["layers"])


@dataclass(frozen=True)
class RefusedShape:
    """Why the library's config class refuses a shape, and the nearest hidden sizes it takes."""

    cause: str
    nearest: tuple[int, ...]
    fix: str


def refused_shape(family: Family, config: Mapping[str, Any]) -> RefusedShape | None:
    """What is wrong with a shape under the family's own name; None when its class takes it."""
    size = sizes(family, config)
    hidden, heads = size["hidden"], size["kv_heads"] * size["q_per_kv"]
    if family.hidden_multiple_of_heads and hidden % heads:
        below = hidden - hidden % heads
        return RefusedShape(
            f"the config class of {family.model_type} refuses hidden {hidden} with {heads} heads",
            tuple(h for h in (below, below + heads) if h),
            f"a hidden size that is a multiple of {heads}",
        )
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    lists = {"long_factor", "short_factor"} & rope.keys()
    if family.longrope_lists and lists and hidden // heads != size["head_dim"]:
        width = heads * size["head_dim"]
        return RefusedShape(
            f"the config class of {family.model_type} wants one factor of its long context for "
            f"each channel pair of hidden / heads, and hidden {hidden} is not {heads} heads of "
            f"{size['head_dim']}",
            (width,),
            f"a hidden size of {width}, or as many heads as hidden / {size['head_dim']}",
        )
    return None


def _check_lists(family: Family, config: Mapping[str, Any], *, layers: int) -> None:
    """A list with one entry a layer has one for each layer."""
    for key in family.per_layer_lists:
        value = config.get(key)
        if value is not None and (not isinstance(value, list) or len(value) != layers):
            entries = f"{len(value)} entries" if isinstance(value, list) else repr(value)[:60]
            raise ParetronError(
                Problem(
                    Code.INPUT_CONFIG,
                    f"{key} has {entries} for {layers} layers",
                    where=f"config.json: {key}",
                    fix="one entry for each layer",
                )
            )


def relabel(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config under a name whose class accepts its shape: Mistral where Llama refuses.

    Mistral is Llama without biases. UNSUPPORTED for a shape that no class accepts.
    """
    out = dict(config)
    refused = refused_shape(family_of(config), config)
    if refused is None:
        return out
    biased = [k for k in ("attention_bias", "mlp_bias") if config.get(k)]
    if config["model_type"] != "llama" or biased:
        llama = config["model_type"] == "llama"
        way_out = f", and {biased[0]} rules out the Mistral name" if llama else ""
        raise ParetronError(
            Problem(
                Code.UNSUPPORTED,
                refused.cause + way_out,
                where=f"config.json: {biased[0] if way_out else 'hidden_size'}",
                fix=refused.fix,
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
    config = explicit(family, config)
    out = relabel({k: v for k, v in config.items() if v is not None or k in _NULL_MEANS})
    size = sizes(family, config)
    out.setdefault("architectures", [family.architecture])
    out["head_dim"] = size["head_dim"]
    out["num_key_value_heads"] = size["kv_heads"]
    out["tie_word_embeddings"] = bool(config.get("tie_word_embeddings", False))
    out |= _rope(family, config)
    out["dtype"] = out["torch_dtype"] = dtype
    return out


# null is not the default there: it switches the window, or the cap, off.
_NULL_MEANS = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")


def _rope(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Both spellings of the rotary embedding: `rope_parameters` and the older keys."""
    if family.rope_local_base:
        return _rope_by_layer_type(config, family.rope_local_base)
    parameters = _rope_parameters(config, config.get("rope_parameters"))
    if config.get("partial_rotary_factor") is not None:
        parameters.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
    if family.longrope_lists and parameters["rope_type"] in ("su", "yarn"):
        parameters["rope_type"] = "longrope"  # names it had before
    out: dict[str, Any] = {
        "rope_parameters": parameters,
        "rope_theta": parameters["rope_theta"],
        "rope_scaling": _scaling(parameters),
    }
    if "partial_rotary_factor" in parameters:
        out["partial_rotary_factor"] = parameters["partial_rotary_factor"]
    if family.longrope_lists and out["rope_scaling"] is not None:
        # transformers 4 refuses any other key here, and 5 reads these three too.
        lists = {k: parameters[k] for k in ("short_factor", "long_factor") if k in parameters}
        out["rope_scaling"] = {"type": parameters["rope_type"], **lists}
    return out


def _rope_by_layer_type(config: Mapping[str, Any], local_base: str) -> dict[str, Any]:
    """Global layers are scaled, local ones are not; transformers 4 has two keys for their bases."""
    given = config.get("rope_parameters") or {}
    full = _rope_parameters(config, given.get("full_attention"))
    local = {"rope_type": "default"} | dict(given.get("sliding_attention") or {})
    local.setdefault("rope_theta", config[local_base])
    return {
        "rope_parameters": {"full_attention": full, "sliding_attention": local},
        "rope_theta": full["rope_theta"],
        local_base: local["rope_theta"],
        "rope_scaling": _scaling(full),
    }


def _rope_parameters(config: Mapping[str, Any], given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The newer spelling from what the older keys and it itself say, which goes first."""
    legacy = dict(config.get("rope_scaling") or {})
    if "type" in legacy:  # the oldest spelling of rope_type
        legacy.setdefault("rope_type", legacy.pop("type"))
    parameters = {"rope_type": "default"} | legacy | dict(given or {})
    parameters.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    return parameters


def _scaling(parameters: Mapping[str, Any]) -> dict[str, Any] | None:
    not_scaling = ("rope_theta", "partial_rotary_factor")
    if parameters["rope_type"] == "default":
        return None
    return {k: v for k, v in parameters.items() if k not in not_scaling}


def family_and_config(folder: Path) -> tuple[Family, dict[str, Any]]:
    """Both at once, for what needs no weights."""
    config = read_config(folder)
    return family_of(config), config
