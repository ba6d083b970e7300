"""What llama.cpp takes of each family, as its loaders and its graphs have it.

A file says little about the computation: each architecture has its own graph, in which activations,
which layers rotate and which tensors there must be are fixed. A model that differs would load and
give other text, or not load, so it is refused when planning. A window that the graph does not know
ends the context instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from paretron.errors import Code, Problem
from paretron.families import Sizes, family_of, sizes

Q8_0_BLOCK = 32  # weights of one row that share a scale
_SMOLLM3_STEP = 4  # every fourth layer does without the rotary embedding


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's: how it is called and what it can compute.

    `neighbours`: it rotates neighbouring channels where transformers rotates halves. `factors`: it
    reads a factor for each rotary frequency. `square`: its query matrix has as many rows as the
    hidden size. `own_head`: it knows no output matrix that is tied to the embedding.
    """

    name: str
    activation: str = "silu"
    neighbours: bool = False
    factors: bool = False
    square: bool = False
    own_head: bool = False


_LLAMA = Architecture("LLAMA", neighbours=True, factors=True)
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "qwen2": Architecture("QWEN2"),
    "qwen3": Architecture("QWEN3"),
    "qwen3_moe": Architecture("QWEN3MOE"),
    "nemotron": Architecture("NEMOTRON", activation="relu2", own_head=True),
    "phi3": Architecture("PHI3", square=True),
    "olmo2": Architecture("OLMO2", square=True, own_head=True),
    "granite": Architecture("GRANITE", neighbours=True, factors=True),
    "starcoder2": Architecture("STARCODER2", activation="gelu_pytorch_tanh", square=True),
    "smollm3": Architecture("SMOLLM3", neighbours=True),
}


def unsupported(config: Mapping[str, Any], *, quantize: str | None) -> list[Problem]:
    """Every reason why a model with this config.json has no GGUF file."""
    family = family_of(config)
    architecture = ARCHITECTURES.get(family.model_type)
    if architecture is None:
        supported = f"supported: {', '.join(ARCHITECTURES)}"
        return [_problem(f"no {family.model_type} in GGUF", supported)]
    size = sizes(family, config)
    found = [
        *_computation(architecture, config),
        *_layers(family.model_type, config, size),
        *_tensors(architecture, family.model_type, config, size),
    ]
    if quantize == "q8_0":
        found += _unblocked(size)
    elif quantize is not None:
        found.append((f"quantize: {quantize}", "supported: q8_0"))
    return [_problem(cause, fix) for cause, fix in found]


def rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings in one spelling, with `rope_type`, `rope_theta` and the rotated part."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    rope["rope_theta"] = float(rope.get("rope_theta") or config.get("rope_theta") or 1e4)
    part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    default = 0.5 if config["model_type"] == "nemotron" else 1.0
    rope["partial_rotary_factor"] = float(default if part is None else part)
    return rope


def _computation(
    architecture: Architecture, config: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    kinds = ("default", "llama3", "linear") if architecture.factors else ("default", "linear")
    kind = rope_settings(config)["rope_type"]
    if kind not in kinds:
        yield f"rope_type {kind}", f"supported: {', '.join(kinds)}"
    activation = config.get(family_of(config).activation) or architecture.activation
    if activation != architecture.activation:
        cause = f"llama.cpp computes {architecture.name.lower()} with {architecture.activation}"
        yield f"{cause}, not {str(activation)[:40]!r}", f"supported: {architecture.activation}"


def _layers(model_type: str, config: Mapping[str, Any], size: Sizes) -> Iterator[tuple[str, str]]:
    """Layers that are not all alike, where the graph has its own idea of which is which."""
    if model_type == "smollm3":
        interval = config.get("no_rope_layer_interval") or _SMOLLM3_STEP
        count = size["layers"]
        rotate = config.get("no_rope_layers") or [(i + 1) % interval != 0 for i in range(count)]
        if [bool(r) for r in rotate] != [(i + 1) % _SMOLLM3_STEP != 0 for i in range(count)]:
            yield (
                f"llama.cpp rotates all layers of smollm3 but every {_SMOLLM3_STEP}th",
                "keep the layers in groups of four",
            )
    if model_type == "qwen3_moe":
        if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
            yield "llama.cpp's qwen3moe has experts in every layer", "a model without plain MLPs"
        if config.get("norm_topk_prob") is not True:
            yield (
                "llama.cpp's qwen3moe makes the chosen experts' weights sum to one",
                "a model with norm_topk_prob",
            )


def _tensors(
    architecture: Architecture, model_type: str, config: Mapping[str, Any], size: Sizes
) -> Iterator[tuple[str, str]]:
    name = architecture.name.lower()
    rows = size["kv_heads"] * size["q_per_kv"] * size["head_dim"]
    if architecture.square and rows != size["hidden"]:
        yield (
            f"llama.cpp's {name} needs heads * head_dim = hidden, not {rows} and {size['hidden']}",
            "another shape",
        )
    if architecture.own_head and config.get("tie_word_embeddings"):
        yield f"llama.cpp's {name} needs an output matrix of its own", "an untied model"
    if model_type == "starcoder2" and config.get("use_bias") is False:
        yield "llama.cpp's starcoder2 needs biases", "a model with use_bias"
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key) and model_type in ("phi3", "olmo2", "qwen3", "qwen3_moe", "mixtral"):
            yield f"llama.cpp's {name} knows no {key}", f"a model without {key}"


def _unblocked(size: Sizes) -> Iterator[tuple[str, str]]:
    rows = {
        "hidden": size["hidden"],
        "heads * head_dim": size["kv_heads"] * size["q_per_kv"] * size["head_dim"],
    } | {axis: size[axis] for axis in ("ffn", "moe_ffn") if axis in size}
    for name, n in rows.items():
        if n % Q8_0_BLOCK:
            below, above = n // Q8_0_BLOCK * Q8_0_BLOCK, -(-n // Q8_0_BLOCK) * Q8_0_BLOCK
            yield (
                f"{name} is {n}, and q8_0 blocks rows by {Q8_0_BLOCK}",
                f"nearest: {below or above} or {above}",
            )


def _problem(cause: str, fix: str) -> Problem:
    return Problem(Code.UNSUPPORTED, cause, fix=fix)
