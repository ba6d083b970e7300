"""ONNX graphs as files: the one place that imports the onnx package.

A graph may name any file as the place of its weights, so only plain files beside it are read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from paretron.artifacts.external import beside
from paretron.errors import Code, ParetronError, Problem

if TYPE_CHECKING:
    import torch

# onnx.TensorProto's numbers of the types that weights have.
_TYPES = {1: "float32", 2: "uint8", 10: "float16", 16: "bfloat16"}
_BYTES = {"float32": 4, "uint8": 1, "float16": 2, "bfloat16": 2}
_EMBEDDING_SCALE = "/model/embed_tokens/Mul"
_ALIGNMENT = 64  # bytes, which a processor's widest loads want


@dataclass(frozen=True)
class Initialiser:
    """Where one weight of a graph lies: `start` is the byte offset in `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int

    def read(self) -> torch.Tensor:
        """The weight, memory-mapped and not to be written to."""
        import torch

        nbytes = _BYTES[self.dtype] * prod(self.shape)
        mapped = np.memmap(self.file, np.uint8, mode="c", offset=self.start, shape=(nbytes,))
        return torch.from_numpy(mapped).view(getattr(torch, self.dtype)).view(self.shape)


@dataclass(frozen=True)
class Graph:
    """An ONNX graph's versions and weights."""

    ir_version: int
    opset: int
    initialisers: dict[str, Initialiser]


def read_graph(model_file: Path, *, constants: bool = False) -> Graph:
    """A graph whose weights are external; `constants` may lie in the graph, and are left out.

    Errors: INPUT_UNSAFE_PATH when a weight's file is not a plain file in the graph's folder
    (a link, a path), INPUT_TRUNCATED, INPUT_EXTERNAL when a weight is of another kind.
    """
    import onnx

    model = onnx.load(model_file, load_external_data=False)
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    tensors = [t for t in model.graph.initializer if t.external_data or not constants]
    found = [_initialiser(t, model_file.parent) for t in tensors]
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


def write_embedding_scale(model_file: Path, scale: float, *, dtype: str) -> None:
    """Multiply embeddings by `scale` itself, which the builder rounds to two decimals."""
    import onnx

    model = onnx.load(model_file, load_external_data=False)
    (multiply,) = [n for n in model.graph.node if n.name == _EMBEDDING_SCALE]
    kind = next(number for number, name in _TYPES.items() if name == dtype)
    exact = onnx.helper.make_tensor("scale", kind, (), [scale])
    constant = onnx.helper.make_node("Constant", [], [f"{_EMBEDDING_SCALE}/scale"], value=exact)
    multiply.input[1] = constant.output[0]
    model.graph.node.insert(0, constant)
    model_file.write_bytes(model.SerializeToString(deterministic=True))


def _initialiser(tensor: Any, folder: Path) -> Initialiser:
    place = {e.key: e.value for e in tensor.external_data}
    shape = tuple(tensor.dims)
    dtype = _TYPES.get(tensor.data_type)
    if dtype is None or "location" not in place:
        raise _bad(Code.INPUT_EXTERNAL, "not an external weight of a known type", tensor.name)
    file = beside(folder, place["location"], where=f"model.onnx: {tensor.name[:200]}")
    nbytes = _BYTES[dtype] * prod(shape)
    offset, length = place.get("offset", "0"), place.get("length", str(nbytes))
    if not offset.isdecimal() or length != str(nbytes):
        raise _bad(
            Code.INPUT_EXTERNAL, f"offset and length do not hold {nbytes} bytes", tensor.name
        )
    start = int(offset)
    if start + nbytes > file.stat().st_size:
        raise _bad(Code.INPUT_TRUNCATED, f"{file.name} ends before byte {start + nbytes}",
                   tensor.name)  # fmt: skip
    return Initialiser(tensor.name, dtype, shape, file, start)


def _bad(code: Code, cause: str, tensor: str) -> ParetronError:
    return ParetronError(Problem(code, cause, where=f"model.onnx: {tensor[:200]}"))


def share_weights(graphs: Mapping[str, Path], folder: Path, *, data: str) -> None:
    """Write graphs into `folder` as NAME.onnx, with their weights in one file, each of them once.

    Weights are float32 of any rank but zero; what shapes are made of stays in the graph. What an
    exporter says about the code that it traced, with the paths of this machine, is left out.
    """
    import onnx

    places: dict[bytes, tuple[int, int]] = {}
    with (folder / data).open("wb") as file:
        for name, path in graphs.items():
            model = onnx.load(path, load_external_data=False)
            for tensor in model.graph.initializer:
                if _TYPES.get(tensor.data_type) == "float32" and tensor.dims:
                    _move(tensor, _content(tensor, path.parent), file, data, places)
            for part in (model, model.graph, *model.graph.node, *model.graph.value_info):
                del part.metadata_props[:]
            model.doc_string = model.graph.doc_string = ""
            for node in model.graph.node:
                node.doc_string = ""
            (folder / f"{name}.onnx").write_bytes(model.SerializeToString(deterministic=True))


def _move(
    tensor: Any, content: bytes, file: IO[bytes], data: str, places: dict[bytes, tuple[int, int]]
) -> None:
    """Put a tensor's bytes behind the others, unless they are there, and point it to them."""
    import onnx

    digest = hashlib.sha256(content).digest()
    if digest not in places:
        file.write(bytes(-file.tell() % _ALIGNMENT))
        places[digest] = (file.tell(), len(content))
        file.write(content)
    offset, length = places[digest]
    for kind in ("raw_data", "float_data", "external_data"):
        tensor.ClearField(kind)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", data), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def _content(tensor: Any, folder: Path) -> bytes:
    import onnx

    if tensor.external_data:
        return _initialiser(tensor, folder).read().numpy().tobytes()
    return bytes(onnx.numpy_helper.to_array(tensor).tobytes())
