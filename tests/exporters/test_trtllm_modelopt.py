"""Our TensorRT-LLM checkpoints beside those of NVIDIA's own writer, which is deprecated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from trtllmcases import export_engine, ranks_of

PicoMaker = Callable[..., Path]
export = pytest.importorskip("modelopt.torch.export")
# Further keys of theirs say what produced a file, or stand for a loss: modelopt 0.47 drops the
# base and the scaling of rotary embeddings with transformers 5.
SAME = (
    "architecture", "dtype", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_size", "norm_epsilon", "vocab_size", "max_position_embeddings", "hidden_act",
    "use_parallel_embedding", "embedding_sharding_dim", "head_size", "intermediate_size",
    "position_embedding_type", "share_embedding_table", "residual_mlp", "bias", "rotary_pct",
    "lm_head_bias", "mapping",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("degree", [1, 2])
def test_llama_is_the_same_in_both(degree: int, pico: PicoMaker, tmp_path: Path) -> None:
    source = pico("llama", num_hidden_layers=2, dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        export.export_tensorrt_llm_checkpoint(
            model, "llama", dtype=torch.bfloat16, export_dir=tmp_path / "theirs",
            inference_tensor_parallel=degree,
        )  # fmt: skip
    export_engine(source, tmp_path / "ours", tensor_parallel=degree)
    theirs, ours = (ranks_of(tmp_path / name, degree, 1) for name in ("theirs", "ours"))
    for expected, found in zip(theirs[0], ours[0], strict=True):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    said, told = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "ours")
    )
    assert {key: told[key] for key in SAME} == {key: said[key] for key in SAME}
