"""Checkpoints of any size that take no room: true headers over files that are holes."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from paretron.families import expected_tensors, family_of
from pico import pico_tokenizer


def sparse_checkpoint(folder: Path, config: Mapping[str, Any], *, shards: int = 4) -> Path:
    """Write a bfloat16 checkpoint of a config's shapes, all zeros, in `shards` files."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    pico_tokenizer().save_pretrained(folder)
    tensors = list(expected_tensors(family_of(config), config).items())
    weight_map = {}
    for k in range(shards):
        name = f"model-{k + 1:05d}-of-{shards:05d}.safetensors"
        header: dict[str, Any] = {}
        end = 0
        for tensor, shape in tensors[k * len(tensors) // shards : (k + 1) * len(tensors) // shards]:
            start, end = end, end + 2 * prod(shape)
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
            weight_map[tensor] = name
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / name).open("wb") as f:
            f.write(struct.pack("<Q", len(text)) + text)
            f.truncate(8 + len(text) + end)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
