"""What the ONNX model builder gets right, what it must be told, and what it cannot do.

It reads some configs wrongly and says nothing: each line here was found by trying, and is held by
a test. The gates would catch them too, but only after hours of training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from paretron.artifacts.config import servable_config
from paretron.errors import Code, ParetronError, Problem
from paretron.families import expected_tensors, family_of, sizes
from paretron.recipe import Export
from paretron_exporters.onnx_precision import precision_problems

# The ways of scaling rotary embeddings that come out right, by family.
ROPE_TYPES: Mapping[str, tuple[str, ...]] = {
    "llama": ("default", "linear", "llama3"),
    "mistral": ("default", "linear", "llama3"),
    "qwen2": ("default", "linear", "llama3"),
    "qwen3": ("default", "linear"),
    "nemotron": ("default",),
    "gemma2": ("default", "linear"),
    "gemma3_text": ("default",),
    "phi3": ("default",),
    "granite": ("default", "linear"),
}
ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2")
# Its Llama class ignores "linear"; its Mistral and Qwen2 classes do not know "llama3". But for that
# the three are the same.
_OTHER_CLASS = {
    ("llama", "linear"): "MistralForCausalLM",
    ("mistral", "llama3"): "LlamaForCausalLM",
    ("qwen2", "llama3"): "LlamaForCausalLM",
}
_MULTIPLE = 16  # of the attention kernel, for head_dim and the channels it rotates
# What transformers takes when a config does not say.
_MISTRAL_WINDOW = 4096
_NEMOTRON_ROTARY = 0.5
_ACTIVATION = {"gemma2": "gelu_pytorch_tanh", "gemma3_text": "gelu_pytorch_tanh"}


def builder_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the builder is told instead of config.json, so that it makes what transformers does."""
    # In float32 from the start: it would add Nemotron's 1 to norm weights in 16 bits.
    told = servable_config(config, dtype="float32")
    if told["model_type"] == "gemma3_text":
        # It reads both bases from one level, where transformers 5 has a level for each attention.
        full = told["rope_parameters"]["full_attention"]
        local = {"rope_local_base_freq": told["rope_local_base_freq"]}
        told["rope_parameters"] = full | local | told["rope_parameters"]
    case = (told["model_type"], told["rope_parameters"]["rope_type"])
    told["architectures"] = [_OTHER_CLASS.get(case, told["architectures"][0])]
    if told["model_type"] == "nemotron":
        # It knows one spelling of epsilon only, and assumes 1e-6 otherwise.
        told["rms_norm_eps"] = told.get("norm_eps", 1e-5)
        told.setdefault("partial_rotary_factor", _NEMOTRON_ROTARY)
    if told["model_type"] == "phi3":
        # Otherwise it makes a graph of two contexts, whatever the rotary embedding.
        told["original_max_position_embeddings"] = told["max_position_embeddings"]
    if told["model_type"] in ("mistral", "phi3"):
        absent = _MISTRAL_WINDOW if told["model_type"] == "mistral" else None
        window = told.get("sliding_window", absent)
        if window is not None and window < told["max_position_embeddings"]:
            # It takes layers for full ones, whatever the window, unless each is named.
            told["layer_types"] = ["sliding_attention"] * told["num_hidden_layers"]
        else:
            told["sliding_window"] = None
    return told


def unsupported(config: Mapping[str, Any], export: Export) -> list[Problem]:
    """Every reason why the builder cannot export a model with this config.json."""
    family = family_of(config).model_type
    if family not in ROPE_TYPES:
        fix = f"supported: {', '.join(ROPE_TYPES)}"
        return [Problem(Code.UNSUPPORTED, f"onnx cannot export the family {family}", fix=fix)]
    try:
        servable = servable_config(config, dtype="float32")
    except ParetronError as error:
        return list(error.problems)
    found = [*_computation(family, servable), *_shape(family, servable)]
    problems = [Problem(Code.UNSUPPORTED, cause, fix=fix) for cause, fix in found]
    return [*precision_problems(export), *problems]


def _computation(family: str, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for rope_type in _rope_types(config["rope_parameters"]):
        if rope_type not in ROPE_TYPES[family]:
            allowed = f"supported for {family}: {', '.join(ROPE_TYPES[family])}"
            yield f"onnx cannot export the rope type {str(rope_type)[:40]!r}", allowed
    activation = config.get(family_of(config).activation, _ACTIVATION.get(family, "silu"))
    if activation not in ACTIVATIONS:
        allowed = f"supported: {', '.join(ACTIVATIONS)}"
        yield f"onnx cannot export the activation {str(activation)[:40]!r}", allowed
    if family == "nemotron" and config.get("mlp_bias"):
        yield "onnx would lose the biases of nemotron's MLP", "a model without mlp_bias"


def _rope_types(parameters: Mapping[str, Any]) -> set[str]:
    """The one of all layers, or those of each kind of attention."""
    each = [p for p in parameters.values() if isinstance(p, Mapping)] or [parameters]
    return {p["rope_type"] for p in each}


def _shape(family: str, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    size = sizes(family_of(config), config)
    head_dim = size["head_dim"]
    if head_dim % _MULTIPLE:
        yield f"onnx cannot export head_dim {head_dim}", f"a multiple of {_MULTIPLE}"
    default = _NEMOTRON_ROTARY if family == "nemotron" else 1.0
    rotated = int(head_dim * config["rope_parameters"].get("partial_rotary_factor", default))
    if rotated % _MULTIPLE:
        cause = f"onnx cannot rotate {rotated} of {head_dim} channels"
        yield cause, f"a multiple of {_MULTIPLE}"
    one_layer = dict(config) | {"num_hidden_layers": 1}
    for name, shape in expected_tensors(family_of(config), one_layer).items():
        if ".layers." in name and len(shape) == 2 and shape[0] == size["vocab"]:
            part = name.removeprefix("model.layers.0.").removesuffix(".weight")
            yield (
                f"{part} has as many rows as the vocabulary ({shape[0]}), and the ONNX builder "
                "would take it for the output head",
                "another size of that axis",
            )
