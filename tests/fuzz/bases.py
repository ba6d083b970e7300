"""The sound checkpoints that the damages start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from paretron.artifacts.writer import TensorWriter, dtype_name
from pico import make_pico

SMALL: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "head_dim": 8,
    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 270,
    "max_position_embeddings": 64,
}  # fmt: skip


def make_bases(folder: Path) -> list[Path]:
    """Four small checkpoints: one file, shards of bfloat16, tied, and one with windows."""
    made = [
        make_pico(folder / "llama", "llama", **SMALL),
        _sharded(make_pico(folder / "qwen3", "qwen3", dtype="bfloat16", **SMALL)),
        make_pico(folder / "tied", "llama", tie_word_embeddings=True, **SMALL),
        make_pico(folder / "gemma2", "gemma2", **SMALL),
    ]
    return sorted(made)


def _sharded(folder: Path) -> Path:
    single = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(single).items()}
    single.unlink()
    layout = {n: (dtype_name(t), tuple(t.shape)) for n, t in tensors.items()}
    with TensorWriter(folder, layout, max_shard_bytes=8_000) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    return folder
