"""Which rows and columns of a model each rank of a TensorRT-LLM checkpoint holds, under which name.

One small table says how the format calls a module; how a tensor is cut follows from the axes in
its family's row. Heads, MLP neurons and the vocabulary are cut over the ranks of a layer. Layers
are spread over the stages of a pipeline, in each of which they are numbered from 0 again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from paretron.families import Family, Placed, Sizes, placed_tensors, sizes
from paretron.families.cuts import cut_of
from paretron.families.table import Dim
from paretron_exporters.quantized_forms import quantised, sharing_input

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LAYER = "model.layers.{i}."
# Queries, keys and values are joined to one matrix.
_MODULES = {
    "self_attn.q_proj": "attention.qkv",
    "self_attn.k_proj": "attention.qkv",
    "self_attn.v_proj": "attention.qkv",
    "self_attn.o_proj": "attention.dense",
    "self_attn.q_norm": "attention.q_layernorm",
    "self_attn.k_norm": "attention.k_layernorm",
    "mlp.gate_proj": "mlp.fc",
    "mlp.up_proj": "mlp.gate",
    "mlp.down_proj": "mlp.proj",
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_layernorm",
    "model.embed_tokens": "transformer.vocab_embedding",
    "model.norm": "transformer.ln_f",
    "lm_head": "lm_head",
}
WEIGHT_SCALE, INPUT_SCALE = "weights_scaling_factor", "activation_scaling_factor"


@dataclass(frozen=True)
class Layout:
    """Over how many ranks a layer is cut, and over how many the layers."""

    tensor_parallel: int
    pipeline_parallel: int

    @property
    def ranks(self) -> int:
        """Files of weights."""
        return self.tensor_parallel * self.pipeline_parallel

    def file(self, stage: int, rank: int) -> str:
        """The file of one rank of a layer, in one stage of the pipeline."""
        return f"rank{stage * self.tensor_parallel + rank}.safetensors"

    def stage_layers(self, layers: int) -> tuple[range, ...]:
        """The layers of every stage; the first ones have one more where they do not divide."""
        each, more = divmod(layers, self.pipeline_parallel)
        ends = [each * k + min(k, more) for k in range(self.pipeline_parallel + 1)]
        return tuple(range(a, b) for a, b in pairwise(ends))


@dataclass(frozen=True)
class Piece:
    """A part of a source tensor: its rows, and its columns where those are cut."""

    name: str
    rows: range
    columns: range | None = None


@dataclass(frozen=True)
class Target:
    """One tensor of one rank: pieces joined by rows, then `padding` rows of zeros.

    `added` is what its values are larger by than the source's. `scaled` names the matrices that
    share its FP8 scales; empty where it stays as it is.
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    padding: int = 0
    added: float = 0.0
    scaled: tuple[str, ...] = ()

    @property
    def scale_names(self) -> tuple[str, str]:
        """The names of its two scales, that of the weights first."""
        module = self.name.removesuffix("weight")
        return module + WEIGHT_SCALE, module + INPUT_SCALE


def rank_targets(
    family: Family, config: Mapping[str, Any], layout: Layout, *, stage: int, rank: int
) -> tuple[Target, ...]:
    """The tensors of one rank, in execution order; those of a stage's ranks come in one order."""
    size = sizes(family, config)
    layers = layout.stage_layers(size["layers"])[stage]
    joined: dict[str, list[Placed]] = {}
    for place in _of_stage(family, config, layout, stage, layers):
        name = target_name(place, family, first_layer=layers.start)
        joined.setdefault(name, []).append(place)
    if stage == layout.pipeline_parallel - 1 and config.get("tie_word_embeddings"):
        joined[HEAD] = [next(placed_tensors(family, config))]
    shared = sharing_input(quantised(family, config))
    ranks = layout.tensor_parallel
    return tuple(
        Target(
            name,
            (sum(len(p.rows) for p in pieces) + padding, *_columns(places[0], pieces[0], size)),
            pieces,
            padding=padding,
            added=family.norm_offset if places[0].row.is_norm else 0.0,
            scaled=shared.get(places[0].name, ()),
        )
        for name, places in joined.items()
        for pieces in [tuple(_piece(place, size, ranks, rank) for place in places)]
        for padding in [_padding(places[0], pieces[0], size, ranks)]
    )


def target_name(place: Placed, family: Family, *, first_layer: int) -> str:
    """What the format calls the tensor that holds this one, in a stage that begins there."""
    inside = place.row.name.removeprefix(_LAYER)
    module, _, leaf = inside.rpartition(".")
    called = _MODULES[module]
    if called == "mlp.gate" and not _gated(family):
        called = "mlp.fc"
    prefix = "" if place.layer is None else f"transformer.layers.{place.layer - first_layer}."
    return f"{prefix}{called}.{leaf}"


def _of_stage(
    family: Family, config: Mapping[str, Any], layout: Layout, stage: int, layers: range
) -> Iterator[Placed]:
    first, last = stage == 0, stage == layout.pipeline_parallel - 1
    for place in placed_tensors(family, config):
        if place.layer is None:
            if first if place.name == EMBEDDING else last:
                yield place
        elif place.layer in layers:
            yield place


def _columns(place: Placed, piece: Piece, size: Sizes) -> tuple[int, ...]:
    return place.row.shape(size)[1:] if piece.columns is None else (len(piece.columns),)


def _padding(place: Placed, piece: Piece, size: Sizes, ranks: int) -> int:
    """Rows that a rank lacks of its share of the vocabulary, where that does not divide."""
    if _axes(place.row.dims[0]) != {"vocab"}:
        return 0
    return -(-size["vocab"] // ranks) - len(piece.rows)


def _piece(place: Placed, size: Sizes, ranks: int, rank: int) -> Piece:
    shape, dims, cut = place.row.shape(size), place.row.dims, cut_of(place.row)
    if cut not in ("rows", "columns"):
        return Piece(place.name, range(shape[0]))
    if cut == "columns":
        each = shape[1] // ranks
        return Piece(place.name, range(shape[0]), range(rank * each, (rank + 1) * each))
    axes = _axes(dims[0])
    if "kv_heads" in axes and "q_per_kv" not in axes:
        # A head that several ranks need is kept on each of them.
        heads, width = size["kv_heads"], size["head_dim"]
        first, count = rank * heads // ranks, max(1, heads // ranks)
        return Piece(place.name, range(first * width, (first + count) * width))
    each = -(-shape[0] // ranks)
    first = min(rank * each, shape[0])
    return Piece(place.name, range(first, min(first + each, shape[0])))


def _gated(family: Family) -> bool:
    return any(row.name.endswith("mlp.gate_proj.weight") for row in family.tensors)


def _axes(dim: Dim) -> set[str]:
    return {axis for segment in dim for axis in segment}
