"""Layouts of TensorRT-LLM checkpoints: whatever the ranks, together they are the source."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paretron.artifacts.manifest import verify
from paretron.families import FAMILIES, expected_tensors
from paretron_exporters.trtllm_config import FAMILIES as BUILDABLE
from paretron_exporters.trtllm_layout import Layout, rank_targets
from trtllmcases import assert_is_source, export_engine, joined, ranks_of

PicoMaker = Callable[..., Path]
_ONCE = ("o_proj.weight", "q_proj.weight", "q_proj.bias", "lm_head.weight")
LAYOUTS = ((1, 1), (2, 1), (1, 3), (2, 2))


@pytest.mark.parametrize("family", BUILDABLE)
def test_every_layout_is_the_source(family: str, pico: PicoMaker, tmp_path: Path) -> None:
    source = pico(family)
    config = json.loads((source / "config.json").read_text())
    for tp, pp in LAYOUTS:
        out = tmp_path / f"{tp}-{pp}"
        report = export_engine(source, out, tensor_parallel=tp, pipeline_parallel=pp)
        stages = ranks_of(out, tp, pp)
        assert_is_source(joined(stages, config), source)
        assert [c.level for c in report.checks] == ["L0", "L0", "L1"]
        assert report.passed
        verify(out)
        told = json.loads((out / "config.json").read_text())
        assert told["mapping"] == {"world_size": tp * pp, "tp_size": tp, "pp_size": pp}
        layers = [sum(n.endswith("attention.qkv.weight") for n in s[0]) for s in stages]
        assert layers == {1: [4], 2: [2, 2], 3: [2, 1, 1]}[pp]
        assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("family", "changes", "tp"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}, 2),
        ("nemotron", {"attention_bias": True, "mlp_bias": True}, 2),
        ("qwen2", {"tie_word_embeddings": True, "num_hidden_layers": 2}, 2),
        ("llama", {"num_attention_heads": 8, "num_key_value_heads": 2}, 4),  # more ranks than keys
        ("qwen3", {"vocab_size": 333}, 2),  # padded to 334
        ("llama", {"vocab_size": 269, "num_attention_heads": 8, "num_key_value_heads": 8}, 8),
    ],
)  # fmt: skip
def test_awkward_shapes(
    family: str, changes: dict[str, Any], tp: int, pico: PicoMaker,
    tmp_path: Path,
) -> None:  # fmt: skip
    source = pico(family, **changes)
    config = json.loads((source / "config.json").read_text())
    export_engine(source, tmp_path / "out", tensor_parallel=tp, pipeline_parallel=2)
    stages = ranks_of(tmp_path / "out", tp, 2)
    assert_is_source(joined(stages, config), source)
    rows = -(-config["vocab_size"] // tp)
    for files, name in (
        (stages[0], "transformer.vocab_embedding.weight"),
        (stages[-1], "lm_head.weight"),
    ):
        whole = torch.cat([t[name] for t in files])
        assert whole.shape[0] == rows * tp
        assert not whole[config["vocab_size"] :].any()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_ranks_hold_every_value_once(data: st.DataObject) -> None:
    """Over head counts, vocabularies and degrees: rows and columns of the plan tile the model."""
    tp = data.draw(st.sampled_from([1, 2, 3, 4, 8]))
    pp = data.draw(st.integers(1, 5))
    kv_heads = data.draw(st.sampled_from([n for n in range(1, 17) if not (n % tp and tp % n)]))
    q_per_kv = data.draw(st.sampled_from([n for n in range(1, 9) if kv_heads * n % tp == 0]))
    config: dict[str, Any] = {
        "model_type": data.draw(st.sampled_from(BUILDABLE)), "hidden_size": 24,
        "num_hidden_layers": data.draw(st.integers(pp, 11)),
        "intermediate_size": tp * data.draw(st.integers(1, 9)),
        "vocab_size": data.draw(st.integers(1, 70)), "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * q_per_kv, "head_dim": data.draw(st.integers(1, 5)),
        "tie_word_embeddings": data.draw(st.booleans()),
    }  # fmt: skip
    family, layout = FAMILIES[str(config["model_type"])], Layout(tp, pp)
    seen = {n: np.zeros(s, dtype=int) for n, s in expected_tensors(family, config).items()}
    layers = layout.stage_layers(int(config["num_hidden_layers"]))
    assert [len(r) for r in layers] == [len(p) for p in np.array_split(range(layers[-1].stop), pp)]
    for stage in range(pp):
        for rank in range(tp):
            for target in rank_targets(family, config, layout, stage=stage, rank=rank):
                rows = sum(len(piece.rows) for piece in target.pieces)
                assert target.shape[0] == rows + target.padding
                for piece in target.pieces:
                    columns = slice(None)
                    if piece.columns is not None:
                        columns = slice(piece.columns.start, piece.columns.stop)
                    seen[piece.name][piece.rows.start : piece.rows.stop][..., columns] += 1
    for name, count in seen.items():
        expected = tp
        if name.endswith(_ONCE) or ".mlp." in name:
            expected = 1
        elif "k_proj" in name or "v_proj" in name:
            expected = max(1, tp // kv_heads)
        elif name == "model.embed_tokens.weight":
            expected = 1 + bool(config["tie_word_embeddings"])
        assert (count == expected).all(), name
