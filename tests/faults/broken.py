"""Ways to change a pico checkpoint on disk, for the rows of group I."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from paretron.artifacts.reader import INDEX, SINGLE
from paretron.artifacts.writer import TensorWriter, dtype_name

NORM = "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"

RECIPE = """\
schema: 1
teacher: {model: ./model}
data:
  calibration: {corpus: stdlib, part: calibration, seq_len: 64}
  train: {corpus: stdlib, part: train, seq_len: 64}
  validation: {corpus: stdlib, part: validation, seq_len: 64}
students: {width: {hidden: 48}}
distill: {tokens: 1.0e5, global_batch: 8}
"""


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in load_file(folder / SINGLE).items()}


def set_weights(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    tensors = weights(folder) | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / SINGLE)


def set_config(folder: Path, **changes: object) -> None:
    set_json(folder / "config.json", **changes)


def set_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard(folder: Path) -> tuple[dict[str, str], list[str]]:
    """Split the weights into shards; the index's map and the shards' names."""
    tensors = weights(folder)
    (folder / SINGLE).unlink()
    layout = {n: (dtype_name(t), tuple(t.shape)) for n, t in tensors.items()}
    with TensorWriter(folder, layout, max_shard_bytes=100_000) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    return weight_map, sorted(set(weight_map.values()))


def set_map(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def set_header(folder: Path, text: bytes, data: bytes, *, length: int | None = None) -> None:
    size = len(text) if length is None else length
    (folder / SINGLE).write_bytes(struct.pack("<Q", size) + text + data)


def header(folder: Path) -> tuple[dict[str, dict[str, list[int]]], bytes]:
    content = (folder / SINGLE).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def two_last(entries: dict[str, dict[str, list[int]]]) -> list[str]:
    names = [n for n in entries if n != "__metadata__"]
    return sorted(names, key=lambda n: entries[n]["data_offsets"])[-2:]
