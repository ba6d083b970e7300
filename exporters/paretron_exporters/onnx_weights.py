"""The weights inside an ONNX graph, read with suspicion and matched to the checkpoint's tensors.

A graph may name any file as the place of its weights, so only plain files beside it are read.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from paretron.artifacts.reader import Checkpoint
from paretron.errors import Code, ParetronError, Problem
from paretron.families import expected_tensors, sizes

if TYPE_CHECKING:
    import torch

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_FLOAT32 = 1  # onnx.TensorProto.FLOAT
_EMBEDDING_SCALE = "/model/embed_tokens/Mul"
# Rotary tables by the attention they are for; "" where all layers share them.
ROPE_TABLES = {
    "": ("cos_cache", "sin_cache"),
    "full_attention": ("cos_cache_global", "sin_cache_global"),
    "sliding_attention": ("cos_cache_local", "sin_cache_local"),
}


@dataclass(frozen=True)
class Initialiser:
    """Where one float32 weight of a graph lies: `start` is the byte offset in `file`."""

    name: str
    shape: tuple[int, ...]
    file: Path
    start: int

    def read(self) -> torch.Tensor:
        """The weight, memory-mapped and not to be written to."""
        import torch

        mapped = np.memmap(self.file, np.float32, mode="c", offset=self.start, shape=self.shape)
        return torch.from_numpy(mapped)


@dataclass(frozen=True)
class Graph:
    """An ONNX graph's versions and weights."""

    ir_version: int
    opset: int
    initialisers: dict[str, Initialiser]


def read_graph(model_file: Path) -> Graph:
    """A float32 graph whose weights are external.

    Errors: INPUT_UNSAFE_PATH when a weight's file is not a plain file in the graph's folder
    (a link, a path), INPUT_TRUNCATED, INPUT_EXTERNAL when a weight is of another kind.
    """
    import onnx

    model = onnx.load(model_file, load_external_data=False)
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    found = [_initialiser(t, model_file.parent) for t in model.graph.initializer]
    return Graph(model.ir_version, opset, {i.name: i for i in found})


def stamp_producer(model_file: Path, version: str) -> None:
    """Put the builder's version alone into the graph.

    The builder adds the commit of whatever repository its installation lies in, which would make
    equal exports differ.
    """
    import onnx

    model = onnx.load(model_file, load_external_data=False)
    model.producer_version = version
    model_file.write_bytes(model.SerializeToString(deterministic=True))


def write_embedding_scale(model_file: Path, scale: float) -> None:
    """Multiply embeddings by `scale` itself, which the builder rounds to two decimals."""
    import onnx

    model = onnx.load(model_file, load_external_data=False)
    (multiply,) = [n for n in model.graph.node if n.name == _EMBEDDING_SCALE]
    exact = onnx.helper.make_tensor("scale", _FLOAT32, (), [scale])
    constant = onnx.helper.make_node("Constant", [], [f"{_EMBEDDING_SCALE}/scale"], value=exact)
    multiply.input[1] = constant.output[0]
    model.graph.node.insert(0, constant)
    model_file.write_bytes(model.SerializeToString(deterministic=True))


def _initialiser(tensor: Any, folder: Path) -> Initialiser:
    place = {e.key: e.value for e in tensor.external_data}
    shape = tuple(tensor.dims)
    if tensor.data_type != _FLOAT32 or "location" not in place:
        raise _bad(Code.INPUT_EXTERNAL, "not an external float32 weight", tensor.name)
    file = _beside(folder, place["location"], tensor.name)
    nbytes = 4 * prod(shape)
    offset, length = place.get("offset", "0"), place.get("length", str(nbytes))
    if not offset.isdecimal() or length != str(nbytes):
        raise _bad(
            Code.INPUT_EXTERNAL, f"offset and length do not hold {nbytes} bytes", tensor.name
        )
    start = int(offset)
    if start + nbytes > file.stat().st_size:
        raise _bad(Code.INPUT_TRUNCATED, f"{file.name} ends before byte {start + nbytes}",
                   tensor.name)  # fmt: skip
    return Initialiser(tensor.name, shape, file, start)


def _beside(folder: Path, location: str, tensor: str) -> Path:
    if not _PLAIN_NAME.fullmatch(location):
        cause = f"{location[:80]!r} is not a plain file name"
        raise _bad(Code.INPUT_UNSAFE_PATH, cause, tensor)
    path = folder / location
    try:
        status = os.lstat(path)
    except FileNotFoundError as error:
        raise _bad(Code.INPUT_MISSING, f"no file {location}", tensor) from error
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        raise _bad(Code.INPUT_UNSAFE_PATH, f"{location} is a link", tensor)
    return path


def _bad(code: Code, cause: str, tensor: str) -> ParetronError:
    return ParetronError(Problem(code, cause, where=f"model.onnx: {tensor[:200]}"))


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


def expected_initialisers(checkpoint: Checkpoint) -> dict[str, Match]:
    """Every weight that the builder's graph of a checkpoint holds, rotary tables left out."""
    layers = sizes(checkpoint.family, checkpoint.config)["layers"]
    tied = "lm_head.weight" not in checkpoint.entries
    groups: dict[str, list[str]] = {}
    # In the table's order, by which query, key and value are joined; the file's may differ.
    for name in expected_tensors(checkpoint.family, checkpoint.config):
        groups.setdefault(_graph_name(name, layers=layers, tied=tied), []).append(name)
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
    return found


def weight_pairs(
    checkpoint: Checkpoint, graph: Graph, matches: dict[str, Match]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(the checkpoint's name, its tensor in float32, the same in the graph) for every tensor."""
    for graph_name, match in matches.items():
        joined = graph.initialisers[graph_name].read()
        rows = joined.t() if match.transposed else joined
        if len(match.sources) == 1:
            (name,) = match.sources
            own = checkpoint.read(name).narrow(0, match.first_row, len(rows))
            yield name, own.float() + match.plus, rows
            continue
        parts = rows.split([checkpoint.entries[n].shape[0] for n in match.sources])
        for name, part in zip(match.sources, parts, strict=True):
            yield name, checkpoint.read(name).float() + match.plus, part


def _graph_name(name: str, *, layers: int, tied: bool) -> str:
    """The builder's name of a checkpoint's tensor; one name for what it joins."""
    if name == "lm_head.weight" or (tied and name == "model.embed_tokens.weight"):
        return "lm_head.MatMul.weight"
    name = name.replace("model.norm.", f"model.layers.{layers}.final_norm_layernorm.")
    name = re.sub(r"self_attn\.[qkv]_proj\.", "attn.qkv_proj.", name).replace("self_attn.", "attn.")
    name = re.sub(r"\.([qk])_norm\.", r".\1_norm.layernorm.", name)
    name = re.sub(r"_proj\.weight$", "_proj.MatMul.weight", name)
    return re.sub(r"_proj\.bias$", "_proj.Add.bias", name)
