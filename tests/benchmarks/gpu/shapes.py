"""Shapes that GPU benchmarks run: Llama-3.1-8B, its 4B students, and a pico pair for a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from paretron.data.store import DOCUMENTS, HEADER, TokenStore, shard_file

LLAMA_8B: dict[str, Any] = {
    "vocab_size": 128256, "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 8192, "rope_theta": 500000.0, "tie_word_embeddings": False,
}  # fmt: skip
WIDTH_4B = LLAMA_8B | {"hidden_size": 3072, "intermediate_size": 9216}
DEPTH_4B = LLAMA_8B | {"num_hidden_layers": 16}
PICO = LLAMA_8B | {
    "vocab_size": 640, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
PICO_STUDENT = PICO | {"hidden_size": 48, "intermediate_size": 64}


def random_llama(shape: dict[str, Any], *, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """A Llama of random weights, made where it is used."""
    torch.manual_seed(0)
    with torch.device(device):
        config = AutoConfig.for_model("llama", **shape)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def random_tokens(folder: Path, *, vocab: int, count: int) -> TokenStore:
    """A token store of one random text."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = np.random.default_rng(0).integers(3, vocab, count)
    tokens.astype("<u4").tofile(folder / shard_file(0))
    np.zeros(1, "<u8").tofile(folder / DOCUMENTS)
    header = {
        "dtype": "uint32", "num_tokens": count, "shard_tokens": count, "num_documents": 1,
        "eos_token_id": 1,
    }  # fmt: skip
    (folder / HEADER).write_text(json.dumps(header))
    return TokenStore.open(folder)


def machine() -> dict[str, str]:
    """What ran."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"device": device, "torch": torch.__version__}
