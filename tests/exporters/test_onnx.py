"""The onnx exporter: every family runs in ONNX Runtime GenAI as it does in transformers."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paretron.artifacts.companions import TOKENIZER_FILES
from paretron.artifacts.config import read_config
from paretron.artifacts.manifest import read_manifest, verify
from paretron.artifacts.models import load_model
from paretron.errors import Code, ParetronError
from paretron_exporters import genai, onnx, onnx_gates
from paretron_exporters.onnx import EXPORTER
from paretron_exporters.onnx_file import read_graph
from paretron_exporters.onnx_limits import ROPE_TYPES
from pico import PICO_FAMILIES

og = pytest.importorskip("onnxruntime_genai")

PicoMaker = Callable[..., Path]
RunExport = Callable[..., Any]
Spoil = Callable[[Path], None]

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


def greedy_by_genai(folder: Path, prompt: list[int], steps: int) -> list[int]:
    model = og.Model(str(folder))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + steps, min_length=len(prompt) + steps)
    generator = og.Generator(model, params)
    generator.append_tokens(np.array([prompt], dtype=np.int32))
    for _ in range(steps):
        generator.generate_next_token()
    return [int(t) for t in generator.get_sequence(0)][len(prompt) :]


def greedy_by_transformers(folder: Path, prompt: list[int], steps: int) -> list[int]:
    model = load_model(folder)
    out = model.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=steps, min_new_tokens=steps
    )
    return [int(t) for t in out[0, len(prompt) :]]


@pytest.mark.parametrize("family", [f for f in PICO_FAMILIES if f in ROPE_TYPES])
def test_every_family_gives_the_same_logits_and_tokens(
    family: str, pico: PicoMaker, run_export: RunExport, tmp_path: Path
) -> None:
    source = pico(family)
    config = read_config(source)
    assert config["num_attention_heads"] * config["head_dim"] != config["hidden_size"]
    report = run_export(EXPORTER, source, tmp_path / "out")
    levels = {(c.level, c.about): c for c in report.checks}
    assert levels["L1", "weights"].measured["max_abs"] == 0.0
    assert levels["L1", "rotary tables"].measured["max_abs"] < 1e-6
    assert levels["L2", "logits"].measured["max_abs"] < 1e-4
    assert levels["L3", "cached decode against full forward"].measured["max_abs"] < 1e-4
    assert levels["L4", "greedy tokens"].measured["equal"] == 4
    prompt = [7, 300, 42, 9, 9, 120]
    tokens = greedy_by_genai(tmp_path / "out", prompt, 20)
    assert tokens == greedy_by_transformers(source, prompt, 20)
    verify(tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("mistral", {"sliding_window": 32}),
        ("mistral", {"sliding_window": 4096}),
        ("mistral", {"hidden_size": 44, "num_attention_heads": 6}),
        ("mistral", {"rope_parameters": LLAMA3}),
        ("mistral", {"rope_parameters": LINEAR}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("llama", {"rope_parameters": LINEAR}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 48}),
        ("llama", {"num_key_value_heads": 1, "hidden_act": "gelu_new", "dtype": "bfloat16"}),
        ("qwen2", {"rope_parameters": LLAMA3, "num_key_value_heads": 4}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}),
        ("qwen3", {"rope_parameters": LINEAR, "attention_bias": True}),
        ("nemotron", {"norm_eps": 1e-2, "dtype": "bfloat16"}),
        ("nemotron", {"partial_rotary_factor": 1.0, "attention_bias": True}),
        ("nemotron", {"tie_word_embeddings": True, "hidden_act": "gelu"}),
        # The root of 48 is no number of two decimals; a window of 300 is more than the prompts.
        ("gemma2", {"hidden_size": 48, "sliding_window": 300, "attention_bias": True}),
        ("gemma2", {"rope_parameters": LINEAR, "attn_logit_softcapping": None}),
        ("gemma3_text", {"hidden_size": 40, "tie_word_embeddings": True}),
        ("phi3", {"sliding_window": 32, "partial_rotary_factor": 0.5}),
        ("phi3", {"original_max_position_embeddings": 256, "num_key_value_heads": 4}),
        ("granite", {"rope_parameters": LINEAR, "attention_bias": True, "mlp_bias": True}),
    ],
    ids=str,
)  # fmt: skip
def test_what_the_builder_alone_gets_wrong_comes_out_right(
    family: str, config: dict[str, Any], pico: PicoMaker, run_export: RunExport, tmp_path: Path
) -> None:
    report = run_export(EXPORTER, pico(family, num_hidden_layers=2, **config), tmp_path / "out")
    assert report.passed


@pytest.mark.parametrize(
    ("family", "told"),
    [
        ("nemotron", {"rms_norm_eps": 1e-6}),
        ("mistral", {"sliding_window": 32, "layer_types": None}),
        ("llama", {"rope_parameters": LINEAR, "architectures": ["LlamaForCausalLM"]}),
        ("llama", {"rope_theta": 10100.0}),
    ],
)
def test_the_gates_see_a_builder_that_was_told_wrongly(
    family: str, told: dict[str, Any], pico: PicoMaker, run_export: RunExport, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    right = onnx.builder_config

    def wrong(config: dict[str, Any]) -> dict[str, Any]:
        out = right(config) | told
        if "rope_theta" in told:
            out["rope_parameters"] = out["rope_parameters"] | {"rope_theta": told["rope_theta"]}
        return {k: v for k, v in out.items() if k != "layer_types" or v}

    more: dict[str, Any] = {"sliding_window": 32} if family == "mistral" else {}
    if "rope_parameters" in told:
        more = {"rope_parameters": told["rope_parameters"]}
    source = pico(family, num_hidden_layers=2, norm_eps=1e-3, **more)
    monkeypatch.setattr(onnx, "builder_config", wrong)
    with pytest.raises(ParetronError) as caught:
        run_export(EXPORTER, source, tmp_path / "out")
    assert caught.value.exit_code == 5
    assert not (tmp_path / "out").exists()
    if "rope_theta" in told:
        assert caught.value.problems[0].where in ("cos_cache", "sin_cache")


@pytest.mark.parametrize(
    ("part", "row", "column", "tensor"),
    [
        ("1.mlp.down_proj.MatMul.weight", 3, 5, "model.layers.1.mlp.down_proj.weight"),
        # 4 query heads of 32, then 2 key heads, then 2 value heads, as columns
        ("0.attn.qkv_proj.MatMul.weight", 0, 127, "model.layers.0.self_attn.q_proj.weight"),
        ("0.attn.qkv_proj.MatMul.weight", 0, 128, "model.layers.0.self_attn.k_proj.weight"),
        ("0.attn.qkv_proj.MatMul.weight", 0, 192, "model.layers.0.self_attn.v_proj.weight"),
        ("2.final_norm_layernorm.weight", 4, 0, "model.norm.weight"),
    ],
)  # fmt: skip
def test_an_error_of_a_hundredth_in_one_tensor_is_caught(
    part: str, row: int, column: int, tensor: str, pico: PicoMaker, run_export: RunExport,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    build = genai.build

    def wrong(checkpoint: Any, folder: Path, **told: Any) -> None:
        build(checkpoint, folder, **told)
        weight = read_graph(folder / "model.onnx").initialisers[f"model.layers.{part}"]
        width = weight.shape[1] if len(weight.shape) == 2 else 1
        place = weight.start + 4 * (row * width + column)
        data = bytearray(weight.file.read_bytes())
        value = np.frombuffer(data, np.float32, 1, place)[0] + np.float32(1e-2)
        data[place : place + 4] = value.tobytes()
        weight.file.write_bytes(data)

    source = pico(num_hidden_layers=2)
    monkeypatch.setattr(genai, "build", wrong)
    with pytest.raises(ParetronError) as caught:
        run_export(EXPORTER, source, tmp_path / "out")
    assert (caught.value.problems[0].code, caught.value.exit_code) == (Code.GATE_PARITY, 5)
    assert caught.value.problems[0].where == tensor
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == ["model"]


def test_an_engine_config_that_generates_otherwise_is_caught(
    pico: PicoMaker, run_export: RunExport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = genai.build

    def wrong(checkpoint: Any, folder: Path, **told: Any) -> None:
        build(checkpoint, folder, **told)
        file = folder / "genai_config.json"
        told = json.loads(file.read_text())
        told["search"]["repetition_penalty"] = 5.0
        file.write_text(json.dumps(told))

    source = pico(num_hidden_layers=2)
    monkeypatch.setattr(genai, "build", wrong)
    with pytest.raises(ParetronError) as caught:
        run_export(EXPORTER, source, tmp_path / "out")
    assert "own greedy loop" in caught.value.problems[0].cause


def test_a_graph_too_new_for_servers_is_refused(
    pico: PicoMaker, run_export: RunExport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_gates, "MAX_OPSET", 20)
    with pytest.raises(ParetronError) as caught:
        run_export(EXPORTER, pico(num_hidden_layers=1), tmp_path / "out")
    assert "opset 22" in caught.value.problems[0].cause


def test_the_builder_leaves_nothing_behind(
    pico: PicoMaker, run_export: RunExport, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = pico("qwen2", num_hidden_layers=2)
    before, cwd = list(sys.path), os.getcwd()
    run_export(EXPORTER, source, tmp_path / "a")
    run_export(EXPORTER, source, tmp_path / "b")
    out, _ = capfd.readouterr()
    assert out == ""
    assert (sys.path, os.getcwd()) == (before, cwd)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "README.md", "genai_config.json", "manifest.json", "model.onnx", "model.onnx.data",
        "parity.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    # The same bytes, and no commit of the repository that the environment happens to lie in.
    assert read_manifest(tmp_path / "a") == read_manifest(tmp_path / "b")
    graph = (tmp_path / "a" / "model.onnx").read_bytes()
    assert f"onnxruntime-genai\x1a\x06{genai.builder_version()}".encode() in graph


def test_the_tokenizer_is_the_sources_and_runs_in_the_engine(
    pico: PicoMaker, run_export: RunExport, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    source = pico("qwen3", num_hidden_layers=1)
    run_export(EXPORTER, source, tmp_path / "out")
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    text = "def main(self): the cat é 日本 + 3"
    engine = og.Tokenizer(og.Model(str(tmp_path / "out")))
    assert [int(t) for t in engine.encode(text)] == AutoTokenizer.from_pretrained(source).encode(
        text
    )
    assert (
        json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]["eos_token_id"]
        == 1
    )


def test_a_builder_that_fails_is_one_line(
    pico: PicoMaker, run_export: RunExport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxruntime_genai.models import builder

    def broken(*_: Any, **__: Any) -> None:
        raise AssertionError("no such\nluck")

    source = pico(num_hidden_layers=1)
    monkeypatch.setattr(builder, "create_model", broken)
    with pytest.raises(ParetronError) as caught:
        run_export(EXPORTER, source, tmp_path / "out")
    (problem,) = caught.value.problems
    assert problem.code is Code.ENGINE
    assert "AssertionError: no such" in problem.cause
    assert "\n" not in problem.cause
    assert not (tmp_path / "out").exists()
