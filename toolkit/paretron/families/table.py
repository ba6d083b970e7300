"""The language of a family table, and reading a config's sizes through it.

A row names a tensor on disk and its dimensions: `,` separates dimensions, `*` factors one into
named axes, `|` joins segments of a fused dimension. `{i}` in the name is the layer's number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from paretron.errors import Code, ParetronError, Problem

AXES = ("vocab", "hidden", "layers", "kv_heads", "q_per_kv", "head_dim", "ffn")

# Above any published model, and small enough that a hostile config cannot make us allocate.
_LARGEST = {"layers": 4096, "vocab": 1 << 24}
_LARGEST_OTHER = 1 << 20

Segment = tuple[str, ...]  # the axes whose product is the segment's length, outermost first
Dim = tuple[Segment, ...]  # the segments joined along one dimension
Sizes = Mapping[str, int]  # the length of every axis


@dataclass(frozen=True)
class Tensor:
    """One row of a table; `when` is "" (always), "untied", or a config flag that must be true."""

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
    def is_norm(self) -> bool:
        """Whether the row is a norm's weight over the residual stream, so its output is hidden."""
        return self.dims_text.strip() == "hidden" and self.name.endswith(".weight")

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        """The tensor's shape when the axes have these sizes."""
        return tuple(sum(_product(seg, sizes) for seg in dim) for dim in self.dims)

    def present(self, config: Mapping[str, Any]) -> bool:
        """Whether a model with this config has the tensor."""
        if self.when == "untied":
            return not config.get("tie_word_embeddings", False)
        return not self.when or bool(config.get(self.when, False))


@dataclass(frozen=True)
class Family:
    """A model family: its Hugging Face names, its table, and what config keys carry its axes."""

    model_type: str
    architecture: str
    tensors: tuple[Tensor, ...]
    norm: str = "rms"  # "rms" or "layernorm"
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

    def row(self, suffix: str) -> Tensor:
        """The one row whose name ends with `suffix`."""
        (found,) = [t for t in self.tensors if t.name.endswith(suffix)]
        return found

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
        raise ParetronError(
            Problem(
                Code.INPUT_CONFIG,
                f"{key} is {str(value)[:60]!r}",
                where=f"config.json: {key}",
                fix=f"a whole number from 1 to {largest}",
            )
        )
    return value


def sizes(family: Family, config: Mapping[str, Any]) -> dict[str, int]:
    """The size of every axis that a config states; INPUT_CONFIG when one is absent or absurd."""
    found = {axis: _positive_int(config, key, axis) for axis, key in family.config_keys.items()}
    heads = _positive_int(config, "num_attention_heads", "heads")
    kv_heads = heads
    if config.get("num_key_value_heads") is not None:
        kv_heads = _positive_int(config, "num_key_value_heads", "heads")
    if heads % kv_heads:
        raise ParetronError(
            Problem(
                Code.INPUT_CONFIG,
                f"{heads} attention heads do not divide over {kv_heads} key-value heads",
                where="config.json: num_key_value_heads",
                fix="a divisor of num_attention_heads",
            )
        )
    if config.get("head_dim") is not None:
        head_dim = _positive_int(config, "head_dim", "head_dim")
    elif found["hidden"] % heads == 0:
        head_dim = found["hidden"] // heads
    else:
        raise ParetronError(
            Problem(
                Code.INPUT_CONFIG,
                f"head_dim is absent and hidden_size {found['hidden']} is not a multiple of "
                f"{heads} heads",
                where="config.json: head_dim",
                fix="state head_dim",
            )
        )
    return found | {"kv_heads": kv_heads, "q_per_kv": heads // kv_heads, "head_dim": head_dim}


def with_sizes(
    family: Family, config: Mapping[str, Any], new: Sizes, *, kept_layers: tuple[int, ...] | None
) -> dict[str, Any]:
    """The config of a model whose axes have sizes `new`: head_dim explicit, per-layer lists cut.

    `kept_layers` are the layers' numbers in the source, in order; None keeps them all.
    """
    out = dict(config)
    for axis, key in family.config_keys.items():
        out[key] = new[axis]
    out["num_attention_heads"] = new["kv_heads"] * new["q_per_kv"]
    out["num_key_value_heads"] = new["kv_heads"]
    out["head_dim"] = new["head_dim"]
    if kept_layers is None:
        return out
    total = config[family.config_keys["layers"]]
    for key, value in config.items():
        if key in family.per_layer_lists or key.endswith("_token_id"):
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
    return out
