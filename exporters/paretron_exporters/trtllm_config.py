"""What the engine builder of TensorRT-LLM (up to 1.2.1) is told of a model, and what it can build.

Each line stands for what its model classes were read to do; a family or setting that was not
looked up is refused, because a wrong engine gives text all the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import paretron
from paretron.artifacts.config import servable_config
from paretron.artifacts.serving import indivisible
from paretron.errors import Code, ParetronError, Problem
from paretron.families import Family, family_of, sizes
from paretron.recipe import Export
from paretron_exporters.trtllm_layout import Layout, rank_targets

DTYPES = ("float32", "bfloat16", "float16")
QUANTIZE = ("fp8",)
ROPE_TYPES = ("default", "linear", "llama3")
# The name of each family's only activation there.
_ACTIVATIONS = {"silu": "silu", "relu2": "squared-relu"}
_USES = {
    "llama": "silu", "mistral": "silu", "qwen2": "silu", "qwen3": "silu", "nemotron": "relu2",
}  # fmt: skip
FAMILIES = tuple(_USES)
# What transformers takes when a config does not say.
_MISTRAL_WINDOW = 4096
_NEMOTRON_ROTARY = 0.5
_EPSILON = {"rms_norm_eps": 1e-6, "norm_eps": 1e-5}
_FP8_MULTIPLE = 16  # of both sizes of a matrix
_QWEN_TRAINED_LENGTH = 8192  # only a scaling of long contexts that is off reads it


def unsupported(config: Mapping[str, Any], export: Export) -> list[Problem]:
    """Every reason why no engine can be built of a model with this config.json.

    RECIPE_VALUE for degrees that do not divide it, UNSUPPORTED for everything else.
    """
    family = family_of(config)
    if family.model_type not in FAMILIES:
        return [_no(f"no {family.model_type} in trtllm_engine", f"one of {', '.join(FAMILIES)}")]
    problems = []
    if export.quantize not in (None, *QUANTIZE):
        problems.append(_no(f"quantize: {export.quantize}", f"supported: {', '.join(QUANTIZE)}"))
    try:
        told = servable_config(config, dtype="float32")
    except ParetronError as error:
        return [*problems, *error.problems]
    problems += [_no(cause, fix) for cause, fix in _computation(family, told)]
    problems += bad_degrees(family, told, export, padded=("vocab",))
    return problems or [_no(*said) for said in _odd_for_fp8(family, told, export)]


def bad_degrees(
    family: Family, config: Mapping[str, Any], export: Export, *, padded: tuple[str, ...] = ()
) -> list[Problem]:
    """RECIPE_VALUE for each axis that the degrees do not divide; `padded` ones need not be."""
    size = sizes(family, config)
    degree, stages = export.tensor_parallel, export.pipeline_parallel
    axes = indivisible(family, size, degree)
    problems = [
        Problem(
            Code.RECIPE_VALUE,
            f"{axis} is {n}, which {degree} devices cannot share",
            where="export.tensor_parallel",
            fix=f"a divisor of {n}",
        )
        for axis, n in axes.items()
        if axis not in padded
    ]
    if stages > size["layers"]:
        problems.append(
            Problem(
                Code.RECIPE_VALUE,
                f"{size['layers']} layers cannot be spread over {stages} devices",
                where="export.pipeline_parallel",
                fix=f"at most {size['layers']}",
            )
        )
    return problems


def checkpoint_config(
    family: Family, config: Mapping[str, Any], layout: Layout, *, dtype: str, fp8: bool
) -> dict[str, Any]:
    """The config.json of a checkpoint for the engine builder; `dtype` is of what is not FP8."""
    size = sizes(family, config)
    told = servable_config(config, dtype=dtype)
    rope = told["rope_parameters"]
    heads = size["kv_heads"] * size["q_per_kv"]
    epsilon = "norm_eps" if family.norm == "layernorm" else "rms_norm_eps"
    return {
        "producer": {"name": "paretron", "version": paretron.__version__},
        "architecture": family.architecture,
        "dtype": dtype,
        "logits_dtype": "float32",
        "num_hidden_layers": size["layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": size["kv_heads"],
        "hidden_size": size["hidden"],
        "intermediate_size": size["ffn"],
        "head_size": size["head_dim"],
        "norm_epsilon": config.get(epsilon, _EPSILON[epsilon]),
        "vocab_size": size["vocab"],
        "max_position_embeddings": config["max_position_embeddings"],
        "hidden_act": _ACTIVATIONS[_USES[family.model_type]],
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": rope["rope_theta"],
        "rotary_scaling": _scaling(told["rope_scaling"]),
        "rotary_pct": _rotated(family, told),
        "use_parallel_embedding": True,
        "embedding_sharding_dim": 0,
        "share_embedding_table": False,
        "residual_mlp": False,
        "lm_head_bias": False,
        **_biases(family, config),
        "mapping": {
            "world_size": layout.ranks,
            "tp_size": layout.tensor_parallel,
            "pp_size": layout.pipeline_parallel,
        },
        "quantization": {
            "quant_algo": "FP8" if fp8 else None,
            "kv_cache_quant_algo": None,
            "exclude_modules": ["lm_head"] if fp8 else None,
        },
    }


def _biases(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Which matrices have biases, and what else each model class asks for."""
    attention, mlp = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    if family.model_type == "nemotron":
        return {"bias": attention, "gpt_variant": "nemotron"}
    found: dict[str, Any] = {"bias": attention, "attn_bias": attention, "mlp_bias": mlp}
    if family.model_type in ("qwen2", "qwen3"):
        own = family.model_type == "qwen2"  # of query, key and value alone
        found |= {"bias": False, "attn_bias": own, "mlp_bias": False}
        found |= {"qwen_type": family.model_type, "seq_length": _QWEN_TRAINED_LENGTH}
    return found


def _scaling(scaling: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The scaling of rotary embeddings under both spellings of its type."""
    return None if scaling is None else {**scaling, "type": scaling["rope_type"]}


def _rotated(family: Family, config: Mapping[str, Any]) -> float:
    absent = _NEMOTRON_ROTARY if family.model_type == "nemotron" else 1.0
    return float(config["rope_parameters"].get("partial_rotary_factor", absent))


def _computation(family: Family, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What such a model computes that no class there does, and what it may be."""
    name = family.model_type
    rope_type = config["rope_parameters"]["rope_type"]
    if rope_type not in ROPE_TYPES:
        yield f"rope type {str(rope_type)[:40]!r}", f"supported: {', '.join(ROPE_TYPES)}"
    activation = config.get(family.activation, _USES[name])
    if activation != _USES[name]:
        yield f"activation {str(activation)[:40]!r} of {name}", f"supported: {_USES[name]}"
    if name != "nemotron" and _rotated(family, config) != 1.0:
        yield f"a partial rotary embedding of {name}", "one of all channels"
    attention, mlp = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    if name == "nemotron" and attention != mlp:
        yield "biases in attention or in the MLP alone", "biases in both, or in neither"
    if name == "qwen3" and attention:
        yield "biases in attention of qwen3", "a model without attention_bias"
    if config.get("max_position_embeddings") is None:
        yield "a config without max_position_embeddings", "state how many positions it knows"
        return
    window = config.get("sliding_window", _MISTRAL_WINDOW if name == "mistral" else None)
    if name in ("qwen2", "qwen3") and "sliding_attention" not in config.get("layer_types", ()):
        window = None
    if window is not None and window < config["max_position_embeddings"]:
        cause = f"a window of {window} tokens, which a TensorRT-LLM engine does not store"
        yield cause, "a model whose layers attend to all tokens"


def _odd_for_fp8(
    family: Family, config: Mapping[str, Any], export: Export
) -> Iterator[tuple[str, str]]:
    """The matrices of a rank whose sizes FP8 kernels do not take."""
    layout = Layout(export.tensor_parallel, 1)
    one_layer = {**config, "num_hidden_layers": 1}
    targets = rank_targets(family, one_layer, layout, stage=0, rank=0)
    for target in targets if export.quantize else ():
        if target.scaled and any(n % _FP8_MULTIPLE for n in target.shape):
            matrix = target.name.removeprefix("transformer.layers.0.").removesuffix(".weight")
            cause = f"FP8 of {matrix}, which is {' x '.join(map(str, target.shape))} on a device"
            yield cause, f"sizes that are multiples of {_FP8_MULTIPLE}"


def _no(cause: str, fix: str) -> Problem:
    return Problem(Code.UNSUPPORTED, cause, fix=fix)
