"""GGUF: the file holds the source's model, and who reads it otherwise than we write finds it so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from paretron.artifacts.manifest import verify
from paretron.artifacts.models import load_tokenizer
from paretron.artifacts.reader import Checkpoint
from paretron.errors import Code, ParetronError
from paretron.families import sizes
from paretron.recipe import Export
from paretron_exporters import gguf_file
from paretron_exporters.gguf import EXPORTER, FILE
from paretron_exporters.gguf_file import ROPE_FREQS, rope_factors
from paretron_exporters.gguf_limits import ARCHITECTURES
from paretron_exporters.gguf_tokenizer import CONTROL, NORMAL, UNUSED

PicoMaker = Callable[..., Path]
RunExport = Callable[..., Any]

IDS = torch.arange(3, 90)[None]
# Shapes that llama.cpp's graph of the family takes, where the usual one is none of them.
SHAPES: dict[str, dict[str, Any]] = {
    "phi3": {"head_dim": 16},
    "olmo2": {"head_dim": 16},
    "starcoder2": {"head_dim": 16},
    "smollm3": {"no_rope_layer_interval": 4},
    "mixtral": {"intermediate_size": 64},
    "qwen3_moe": {"mlp_only_layers": [], "moe_intermediate_size": 64},
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 128,
}  # fmt: skip


def settings(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("quantize", [None, "q8_0"])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_every_family_is_the_same_model(
    family: str, quantize: str | None, pico: PicoMaker, run_export: RunExport, tmp_path: Path
) -> None:
    source = pico(family, num_hidden_layers=2, **SHAPES.get(family, {}))
    report = run_export(EXPORTER, source, tmp_path / "out", quantize=quantize)
    assert report.passed
    assert [c.level for c in report.checks] == ["L0", "L1", "L2", "L3", "L4"]
    largest = report.checks[1].measured["max_abs"]
    assert largest == 0.0 if quantize is None else 1e-4 < largest < 5e-3
    verify(tmp_path / "out")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_matrices_are_cast_and_vectors_are_not(
    dtype: str, pico: PicoMaker, run_export: RunExport, tmp_path: Path
) -> None:
    run_export(EXPORTER, pico("qwen3"), tmp_path / "out", dtype=dtype)
    kinds: dict[int, set[str]] = {}
    for tensor in gguf.GGUFReader(tmp_path / "out" / FILE).tensors:
        kinds.setdefault(sum(int(d) > 1 for d in tensor.shape), set()).add(tensor.tensor_type.name)
    assert kinds == {1: {"F32"}, 2: {"F16" if dtype == "float16" else "BF16"}}


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "qwen3_moe", "nemotron", "phi3", "starcoder2"]
)
def test_transformers_reads_it_as_the_same_model(
    family: str, pico: PicoMaker, run_export: RunExport, tmp_path: Path
) -> None:
    """Another reader undoes the order of rows, so ours is not held to itself alone.

    It knows the weights of these families; of their settings not all that llama.cpp reads.
    """
    source = pico(family, num_hidden_layers=2, **SHAPES.get(family, {}))
    run_export(EXPORTER, source, tmp_path / "out")
    known = {} if family == "llama" else {"config": AutoConfig.from_pretrained(source)}
    found = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file=FILE, dtype=torch.float32, **known
    ).eval()
    expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.inference_mode():
        assert float((found(IDS).logits - expected(IDS).logits).abs().max()) < 1e-4


def test_sizes_and_rotary_settings_are_stated(
    pico: PicoMaker, run_export: RunExport, tmp_path: Path
) -> None:
    run_export(EXPORTER, pico("mistral", sliding_window=64), tmp_path / "out")
    found = settings(tmp_path / "out" / FILE)
    assert found["general.architecture"] == "llama"
    assert found["llama.attention.key_length"] == found["llama.attention.value_length"] == 32
    assert found["llama.attention.head_count"] == 4
    assert found["llama.attention.head_count_kv"] == 2
    assert found["llama.rope.dimension_count"] == 32
    assert found["llama.rope.freq_base"] == 10000.0
    assert found["llama.context_length"] == 64  # llama.cpp would look beyond the window


@pytest.mark.parametrize(
    ("family", "shape", "expected"),
    [
        ("mixtral", {}, {"llama.expert_count": 4, "llama.expert_used_count": 2,
                         "llama.feed_forward_length": 64}),
        ("qwen3_moe", {}, {"qwen3moe.expert_count": 4, "qwen3moe.expert_feed_forward_length": 64,
                           "qwen3moe.attention.key_length": 32}),
        ("nemotron", {"norm_eps": 1e-3}, {"nemotron.attention.layer_norm_epsilon": 1e-3,
                                          "nemotron.rope.dimension_count": 16}),
        ("starcoder2", {"norm_epsilon": 1e-4}, {"starcoder2.attention.layer_norm_epsilon": 1e-4}),
        ("granite", {}, {"granite.attention.scale": 0.25, "granite.embedding_scale": 3.0,
                         "granite.residual_scale": 0.5, "granite.logit_scale": 2.0}),
        ("phi3", {}, {"phi3.attention.sliding_window": 0, "phi3.rope.dimension_count": 16,
                      "phi3.rope.scaling.original_context_length": 512}),
        ("olmo2", {"rms_norm_eps": 1e-4}, {"olmo2.attention.layer_norm_rms_epsilon": 1e-4}),
    ],
)  # fmt: skip
def test_what_a_familys_graph_reads_is_stated(
    family: str, shape: dict[str, Any], expected: dict[str, Any], pico: PicoMaker, tmp_path: Path
) -> None:
    """The keys that llama.cpp's loader of each architecture asks for."""
    source = pico(family, num_hidden_layers=1, **SHAPES.get(family, {}) | shape)
    gguf_file.write_gguf(
        Checkpoint.open(source), tmp_path / FILE, kind="F32", on_event=lambda kind, fields: None
    )
    found = settings(tmp_path / FILE)
    assert {k: found[k] for k in expected} == pytest.approx(expected)


def test_experts_are_stacked_and_routers_kept_whole(pico: PicoMaker, tmp_path: Path) -> None:
    source = pico("qwen3_moe", num_hidden_layers=1, **SHAPES["qwen3_moe"])
    checkpoint = Checkpoint.open(source)
    gguf_file.write_gguf(checkpoint, tmp_path / FILE, kind="Q8_0", on_event=lambda *_: None)
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / FILE).tensors}
    stacked = gguf_file.read_gguf(tmp_path / FILE)["blk.0.ffn_gate_exps.weight"]
    assert stacked.shape == (4, 64, 64)
    third = checkpoint.read("model.layers.0.mlp.experts.3.gate_proj.weight")
    assert float((stacked.values()[3] - third).abs().max()) < 5e-3
    assert tensors["blk.0.ffn_gate_exps.weight"].tensor_type.name == "Q8_0"
    assert tensors["blk.0.ffn_gate_inp.weight"].tensor_type.name == "F32"


def test_the_card_says_how_to_make_k_quants(
    pico: PicoMaker, run_export: RunExport, tmp_path: Path
) -> None:
    run_export(EXPORTER, pico(num_hidden_layers=1), tmp_path / "out", dtype="float16")
    card = (tmp_path / "out" / "README.md").read_text().replace("\\", "")
    assert "llama-quantize model.gguf model-Q4_K_M.gguf Q4_K_M" in card
    assert "own tests: llama.cpp." in card
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]


def test_llama3_scaling_becomes_factors(
    pico: PicoMaker, run_export: RunExport, tmp_path: Path
) -> None:
    source = pico("llama", rope_parameters=LLAMA3)
    run_export(EXPORTER, source, tmp_path / "out")
    tensors = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "out" / FILE).tensors}
    config = AutoConfig.from_pretrained(source)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / 500000.0 ** (torch.arange(0, 32, 2) / 32)
    assert np.allclose(tensors[ROPE_FREQS], (plain / scaled).numpy(), rtol=1e-5)
    assert float(tensors[ROPE_FREQS].max()) == pytest.approx(8.0)
    assert float(tensors[ROPE_FREQS].min()) == 1.0
    checkpoint = Checkpoint.open(pico("qwen2", name="plain"))
    assert rope_factors(checkpoint.config, sizes(checkpoint.family, checkpoint.config)) is None


def test_the_tokenizer_is_whole(pico: PicoMaker, run_export: RunExport, tmp_path: Path) -> None:
    source = pico("llama")
    run_export(EXPORTER, source, tmp_path / "out")
    found = settings(tmp_path / "out" / FILE)
    tokenizer = load_tokenizer(source)
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 320
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert (types[0], types[50], types[-1]) == (CONTROL, NORMAL, UNUSED)
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id == 1
    assert len(found["tokenizer.ggml.merges"]) > 10


def test_a_wrong_tensor_is_caught_and_nothing_published(
    pico: PicoMaker, run_export: RunExport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = gguf_file.to_gguf

    def spoilt(name: str, tensor: torch.Tensor, checkpoint: Checkpoint) -> torch.Tensor:
        return order(name, tensor + 0.01 * ("layers.1.mlp.up_proj" in name), checkpoint)

    monkeypatch.setattr(gguf_file, "to_gguf", spoilt)
    for family, quantize in (("llama", None), ("llama", "q8_0"), ("nemotron", None)):
        source = pico(family, name=f"{family}{quantize}", num_hidden_layers=2)
        with pytest.raises(ParetronError) as caught:
            run_export(EXPORTER, source, tmp_path / "o", quantize=quantize)
        assert caught.value.problems[0].code is Code.GATE_PARITY
        assert caught.value.problems[0].where == "model.layers.1.mlp.up_proj.weight"
        assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("changes", "quantize", "names"),
    [
        ({"model_type": "gemma2"}, None, "no gemma2"),
        ({"model_type": "olmo2", "head_dim": 32}, None, "heads * head_dim = hidden"),
        ({"model_type": "olmo2", "tie_word_embeddings": True}, None, "output matrix of its own"),
        ({"model_type": "starcoder2", "use_bias": False, "hidden_act": None}, None, "needs biases"),
        ({"model_type": "starcoder2", "hidden_act": "gelu"}, None, "gelu_pytorch_tanh"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 0]}, None, "groups of four"),
        ({"model_type": "qwen3"} | {"rope_scaling": LLAMA3}, None, "default, linear"),
        (
            {
                "model_type": "qwen3_moe",
                "num_experts": 4,
                "moe_intermediate_size": 32,
                "num_experts_per_tok": 2,
                "norm_topk_prob": True,
                "mlp_only_layers": [0],
            },
            None,
            "experts in every layer",
        ),
        ({"hidden_act": "gelu"}, None, "with silu, not 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, None, "yarn"),
        ({"intermediate_size": 100}, "q8_0", "nearest: 96 or 128"),
        ({}, "q4_k", "supported: q8_0"),
    ],
)
def test_what_is_not_written_is_said_when_planning(
    changes: dict[str, Any], quantize: str | None, names: str
) -> None:
    config = {
        "model_type": "llama", "vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2,
        "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    } | changes  # fmt: skip
    (problem,) = EXPORTER.problems(config, export=Export(to="gguf", quantize=quantize))
    assert problem.code is Code.UNSUPPORTED
    assert names in problem.cause + problem.fix
