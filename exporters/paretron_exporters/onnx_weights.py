"""Which of a checkpoint's tensors each weight of the model builder's graph is made of."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from paretron.artifacts.reader import Checkpoint
from paretron.families import expected_tensors, sizes
from paretron_exporters.onnx_file import Graph

if TYPE_CHECKING:
    import torch

# Rotary tables by the attention they are for; "" where all layers share them.
ROPE_TABLES = {
    "": ("cos_cache", "sin_cache"),
    "full_attention": ("cos_cache_global", "sin_cache_global"),
    "sliding_attention": ("cos_cache_local", "sin_cache_local"),
}


@dataclass(frozen=True)
class Match:
    """A graph's weight and the checkpoint's tensors that it joins along their rows.

    Linears are stored transposed; `plus` was added to the checkpoint's values. Of a tensor that
    the graph has in parts, rows from `first_row` on are meant.
    """

    sources: tuple[str, ...]
    shape: tuple[int, ...]
    transposed: bool
    plus: float
    first_row: int = 0


def expected_initialisers(checkpoint: Checkpoint, *, shared: bool) -> dict[str, Match]:
    """Every weight that the builder's graph of a checkpoint holds, rotary tables left out.

    `shared`: a tied embedding is there once, as the output matrix.
    """
    layers = sizes(checkpoint.family, checkpoint.config)["layers"]
    tied = "lm_head.weight" not in checkpoint.entries
    groups: dict[str, list[str]] = {}
    # In the table's order, by which query, key and value are joined; the file's may differ.
    for name in expected_tensors(checkpoint.family, checkpoint.config):
        groups.setdefault(_graph_name(name, layers=layers, tied=tied and shared), []).append(name)
    found = {}
    for graph_name, names in groups.items():
        shapes = [checkpoint.entries[n].shape for n in names]
        joined = (sum(s[0] for s in shapes), *shapes[0][1:])
        transposed = graph_name.endswith(".MatMul.weight")
        plus = checkpoint.family.norm_offset if graph_name.endswith("norm.weight") else 0.0
        if ".gate_up_proj." in graph_name:  # the one fused matrix that it takes apart
            rows, columns = joined[0] // 2, joined[1]
            for k, part in enumerate(("gate_proj", "up_proj")):
                name = graph_name.replace("gate_up_proj", part)
                found[name] = Match(tuple(names), (columns, rows), True, plus, first_row=k * rows)
            continue
        found[graph_name] = Match(
            tuple(names), joined[::-1] if transposed else joined, transposed, plus
        )
    if tied and not shared:
        embedding = found["model.embed_tokens.weight"]
        found["lm_head.MatMul.weight"] = replace(
            embedding, shape=embedding.shape[::-1], transposed=True
        )
    return found


def weight_pairs(
    checkpoint: Checkpoint, graph: Graph, matches: Mapping[str, Match], *, dtype: str
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(the checkpoint's name, its tensor in `dtype`, the same in the graph) for every tensor.

    A graph in 16 bits may keep a norm in float32 all the same.
    """
    for graph_name, match in matches.items():
        initialiser = graph.initialisers[graph_name]
        joined = initialiser.read()
        rows = joined.t() if match.transposed else joined
        kept = dtype if initialiser.dtype == dtype else "float32"
        start = 0
        for name in match.sources:
            own = source_rows(checkpoint, name, match, dtype=kept)
            yield name, own, rows[start : start + len(own)]
            start += len(own)


def source_rows(checkpoint: Checkpoint, name: str, match: Match, *, dtype: str) -> torch.Tensor:
    """What one of a match's tensors gives to the graph, cast from float32 as the builder does."""
    import torch

    own = checkpoint.read(name)
    if len(match.sources) == 1:  # of which the graph may have a part only
        own = own.narrow(0, match.first_row, match.shape[1 if match.transposed else 0])
    return (own.float() + match.plus).to(getattr(torch, dtype))


def _graph_name(name: str, *, layers: int, tied: bool) -> str:
    """The builder's name of a checkpoint's tensor; one name for what it joins."""
    if name == "lm_head.weight" or (tied and name == "model.embed_tokens.weight"):
        return "lm_head.MatMul.weight"
    name = name.replace("model.norm.", f"model.layers.{layers}.final_norm_layernorm.")
    name = re.sub(r"self_attn\.[qkv]_proj\.", "attn.qkv_proj.", name).replace("self_attn.", "attn.")
    name = re.sub(r"\.([qk])_norm\.", r".\1_norm.layernorm.", name)
    name = re.sub(r"_proj\.weight$", "_proj.MatMul.weight", name)
    return re.sub(r"_proj\.bias$", "_proj.Add.bias", name)
