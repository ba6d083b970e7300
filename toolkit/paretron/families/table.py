"""The language of a family table, and reading a config's sizes through it.

A row names a tensor on disk and its dimensions: `,` separates dimensions, `*` factors one into
named axes, `|` joins segments of a fused dimension. `{i}` in the name is the layer's number, `{e}`
the expert's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from paretron.errors import Code, ParetronError, Problem
from paretron.families.experts import (
    RULES,
    check_experts,
    enough_experts,
    is_moe_layer,
    layers_renumbered,
)

AXES = (
    "vocab", "hidden", "layers", "kv_heads", "q_per_kv", "head_dim", "ffn", "experts", "moe_ffn",
)  # fmt: skip

# Above any published model, and small enough that a hostile config cannot make us allocate.
_LARGEST = {"layers": 4096, "vocab": 1 << 24, "experts": 4096}
_LARGEST_OTHER = 1 << 20

# Of a row's `when`: the layers that route tokens to experts, and the others.
MOE_LAYER, DENSE_LAYER = "moe_layer", "dense_layer"

Segment = tuple[str, ...]  # the axes whose product is the segment's length, outermost first
Dim = tuple[Segment, ...]  # the segments joined along one dimension
Sizes = Mapping[str, int]  # the length of every axis


@dataclass(frozen=True)
class Tensor:
    """One row of a table, which stands for one tensor, one a layer or one an expert of each layer.

    `when` is "" (always), "untied", a config flag that must be true, or MOE_LAYER or DENSE_LAYER.
    """

    name: str
    dims_text: str
    when: str = ""

    @cached_property
    def dims(self) -> tuple[Dim, ...]:
        """The parsed dimensions, outermost first."""
        return tuple(
            tuple(tuple(a.strip() for a in seg.split("*")) for seg in dim.split("|"))
            for dim in self.dims_text.split(",")
        )

    @property
    def per_layer(self) -> bool:
        """Whether the row stands for one tensor in every layer."""
        return "{i}" in self.name

    @property
    def per_expert(self) -> bool:
        """Whether the row stands for one tensor in every expert."""
        return "{e}" in self.name

    @property
    def is_norm(self) -> bool:
        """Whether the row is a norm's weight over the residual stream, so its output is hidden."""
        return self.dims_text.strip() == "hidden" and self.name.endswith(".weight")

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        """The tensor's shape when the axes have these sizes."""
        return tuple(sum(_product(seg, sizes) for seg in dim) for dim in self.dims)

    def present(self, config: Mapping[str, Any], layer: int | None = None) -> bool:
        """Whether a model with this config has the tensor, in that layer where it is in layers."""
        if self.when == "untied":
            return not config.get("tie_word_embeddings", False)
        if self.when in (MOE_LAYER, DENSE_LAYER):
            return layer is not None and is_moe_layer(config, layer) == (self.when == MOE_LAYER)
        return not self.when or bool(config.get(self.when, False))


@dataclass(frozen=True)
class Family:
    """A model family: its Hugging Face names, its table, and what config keys carry its axes."""

    model_type: str
    architecture: str
    tensors: tuple[Tensor, ...]
    norm: str = "rms"  # "rms" or "layernorm"
    norm_offset: float = 0.0  # a norm multiplies by its weight plus this
    # (matrix, norm) by the ends of their names: the norm is over what that matrix writes into the
    # residual stream, where other families norm what a layer reads.
    post_norms: tuple[tuple[str, str], ...] = ()
    embedding_scale_by_hidden: bool = False  # embeddings are multiplied by sqrt(hidden)
    # Config keys: logits are softcap(head(h) / divisor), softcap(x) = c tanh(x / c).
    logit_softcap: str = ""
    logit_divisor: str = ""
    attention_softcap: str = ""  # the key of such a cap on attention scores
    activation: str = "hidden_act"  # the config key that names it
    # The config class refuses a hidden size that is no multiple of the heads, head_dim or not.
    hidden_multiple_of_heads: bool = False
    # Long contexts as in Phi-3: rope_scaling is a type and two lists of factors, one for each pair
    # of rotated channels, and their number is checked against hidden / heads, not head_dim.
    longrope_lists: bool = False
    # Local layers have a rotary embedding of their own; transformers 4 keeps its base in this key.
    rope_local_base: str = ""
    vllm_head_dim: bool = True  # vLLM reads head_dim; otherwise it takes hidden / heads
    # What a key means that config.json leaves out, where that is not what it usually means.
    absent: Mapping[str, object] = field(default_factory=dict)
    # Every n-th layer attends in full, the others in a window, unless layer_types says otherwise.
    full_attention_every: int = 0
    full_attention_before: str = ""  # the key of the first layer that attends in a window
    # Further keys of config.json that this family has, besides those that all have.
    settings: tuple[str, ...] = ()
    config_keys: Mapping[str, str] = field(
        default_factory=lambda: {
            "vocab": "vocab_size",
            "hidden": "hidden_size",
            "layers": "num_hidden_layers",
            "ffn": "intermediate_size",
        }
    )
    # Config lists with one entry a layer: they are cut with the layers.
    per_layer_lists: tuple[str, ...] = ("layer_types",)
    # Buffers that old exporters saved although the config determines them.
    derived: tuple[str, ...] = ("rotary_emb.inv_freq",)
    # Other spelling of a config key -> the key: either may stand in a config, both are written.
    aliases: Mapping[str, str] = field(default_factory=dict)
    # Parameters that transformers holds under another name than the disk, or made of several rows:
    # those of the experts stacked into one dimension more, several rows joined behind it.
    held: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def row(self, suffix: str) -> Tensor:
        """The one row whose name ends with `suffix`."""
        (found,) = [t for t in self.tensors if t.name.endswith(suffix)]
        return found

    def rows(self, config: Mapping[str, Any], layer: int | None) -> tuple[Tensor, ...]:
        """The rows that a layer has, or those outside of the layers, for None."""
        return tuple(
            t
            for t in self.tensors
            if t.per_layer == (layer is not None) and t.present(config, layer)
        )

    def readers(self, axis: str) -> tuple[Tensor, ...]:
        """The per-layer matrices whose input dimension holds `axis`: activations are tapped there.

        Only the matrices that mix the axis away count, so `hidden` has none here: the outputs of
        the norms stand for it.
        """
        return tuple(
            t
            for t in self.tensors
            if t.per_layer and len(t.dims) == 2 and any(axis in seg for seg in t.dims[1])
        )


def _product(segment: Segment, sizes: Sizes) -> int:
    total = 1
    for axis in segment:
        total *= int(axis) if axis.isdigit() else sizes[axis]
    return total


def _positive_int(config: Mapping[str, Any], key: str, axis: str) -> int:
    value = config.get(key)
    largest = _LARGEST.get(axis, _LARGEST_OTHER)
    if type(value) is not int or not 1 <= value <= largest:
        raise _bad(key, f"{key} is {str(value)[:60]!r}", f"a whole number from 1 to {largest}")
    return value


def _bad(key: str, cause: str, fix: str) -> ParetronError:
    return ParetronError(Problem(Code.INPUT_CONFIG, cause, where=f"config.json: {key}", fix=fix))


def sizes(family: Family, config: Mapping[str, Any]) -> dict[str, int]:
    """The size of every axis that a config states; INPUT_CONFIG when one is absent or absurd.

    An axis that no layer has (experts, or an MLP without them) is left out.
    """
    config = {**config, **spelled(family, config)}
    found = {axis: _positive_int(config, key, axis) for axis, key in family.config_keys.items()}
    heads = _positive_int(config, "num_attention_heads", "heads")
    kv_heads = heads
    if config.get("num_key_value_heads") is not None:
        kv_heads = _positive_int(config, "num_key_value_heads", "heads")
    if heads % kv_heads:
        raise _bad(
            "num_key_value_heads",
            f"{heads} attention heads do not divide over {kv_heads} key-value heads",
            "a divisor of num_attention_heads",
        )
    if config.get("head_dim") is not None:
        head_dim = _positive_int(config, "head_dim", "head_dim")
    elif found["hidden"] % heads == 0:
        head_dim = found["hidden"] // heads
    else:
        raise _bad(
            "head_dim",
            f"head_dim is absent and hidden_size {found['hidden']} is not a multiple of "
            f"{heads} heads",
            "state head_dim",
        )
    found |= {"kv_heads": kv_heads, "q_per_kv": heads // kv_heads, "head_dim": head_dim}
    if "experts" in found:
        check_experts(config, layers=found["layers"], experts=found["experts"])
        for axis in _unused(family, config, found["layers"]):
            del found[axis]
    return found


def spelled(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that have two spellings, under both; INPUT_CONFIG when they disagree."""
    out: dict[str, Any] = {}
    for other, key in family.aliases.items():
        said = {config[k] for k in (key, other) if type(config.get(k)) is int}
        if len(said) > 1:
            cause = f"{config[key]} here, but {other} is {config[other]}"
            raise _bad(key, cause, "make the two agree")
        out |= dict.fromkeys((key, other), *said) if said else {}
    return out


def _unused(family: Family, config: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    """The axes of a kind of layer of which there is none."""
    rules = {t.when for t in family.tensors}
    moe = [is_moe_layer(config, i) for i in range(layers)]
    if DENSE_LAYER in rules and all(moe):
        return ("ffn",)
    if MOE_LAYER in rules and not any(moe):
        return ("experts", "moe_ffn")
    return ()


def with_sizes(
    family: Family, config: Mapping[str, Any], new: Sizes, *, kept_layers: tuple[int, ...] | None
) -> dict[str, Any]:
    """The config of a model whose axes have sizes `new`: head_dim explicit, per-layer lists cut.

    `kept_layers` are the layers' numbers in the source, in order; None keeps them all.
    """
    out = dict(config)
    out |= {key: new[axis] for axis, key in family.config_keys.items() if axis in new}
    out |= {other: out[key] for other, key in family.aliases.items() if other in out}
    if "experts" in new:
        enough_experts(config, new["experts"])
    out["num_attention_heads"] = new["kv_heads"] * new["q_per_kv"]
    out["num_key_value_heads"] = new["kv_heads"]
    out["head_dim"] = new["head_dim"]
    if kept_layers is None:
        return out
    out |= layers_renumbered(config, kept_layers)
    total = config[family.config_keys["layers"]]
    for key, value in config.items():
        if key in (*family.per_layer_lists, *RULES) or key.endswith("_token_id"):
            continue  # several end-of-text tokens are a list too, of a length that means nothing
        if isinstance(value, list) and len(value) == total:
            raise ParetronError(
                Problem(
                    Code.INPUT_CONFIG,
                    f"a list of {total} entries, one a layer, that the {family.model_type} table "
                    "does not know",
                    where=f"config.json: {key}",
                    fix="prune width only, or teach the family table this key",
                )
            )
    for key in family.per_layer_lists:
        if config.get(key) is not None:
            out[key] = [config[key][i] for i in kept_layers]
    out.pop("sliding_window_pattern", None)  # the layers that stay need not follow it
    return out
