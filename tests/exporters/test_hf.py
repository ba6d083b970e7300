"""The hf exporter: every family comes back as it was, by the rules that engines need."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from paretron.artifacts.companions import TOKENIZER_FILES
from paretron.artifacts.manifest import read_manifest, verify
from paretron.artifacts.reader import Checkpoint
from paretron.artifacts.writer import TensorWriter
from paretron.errors import Code, ParetronError
from paretron.recipe import Export
from paretron_exporters import hf
from paretron_exporters.hf import EXPORTER
from pico import PICO_FAMILIES

PicoMaker = Callable[..., Path]
RunExport = Callable[..., Any]

IDS = torch.arange(3, 90)[None]


def logits(folder: Path) -> torch.Tensor:
    """By transformers alone, with nothing of ours in between."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    with torch.inference_mode():
        found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("family", PICO_FAMILIES)
def test_every_family_reloads_with_identical_logits(
    family: str, pico: PicoMaker, run_export: RunExport, tmp_path: Path
) -> None:
    source = pico(family)
    config = json.loads((source / "config.json").read_text())
    assert config["num_attention_heads"] * config["head_dim"] != config["hidden_size"]
    report = run_export(EXPORTER, source, tmp_path / "out")
    assert torch.equal(logits(tmp_path / "out"), logits(source))
    assert report.passed
    assert [c.level for c in report.checks] == ["L0", "L1", "L2", "L3", "L4"]
    assert report.checks[2].measured["max_abs"] == 0.0
    assert report.checks[3].measured["max_abs"] < 1e-4
    verify(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "parity.json").read_text()) == report.as_json()


def test_a_fresh_process_reloads_it_with_no_key_left(
    pico: PicoMaker, run_export: RunExport, tmp_path: Path
) -> None:
    run_export(EXPORTER, pico("qwen3"), tmp_path / "out")
    code = (
        "import sys, json; from transformers import AutoModelForCausalLM as A\n"
        "_, info = A.from_pretrained(sys.argv[1], output_loading_info=True)\n"
        "print(json.dumps({k: sorted(map(str, v)) for k, v in info.items() if v}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert json.loads(done.stdout) == {}


def test_what_engines_need_is_written(
    pico: PicoMaker, run_export: RunExport, tmp_path: Path
) -> None:
    source = pico("llama", rope_parameters={
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 128,
    })  # fmt: skip
    (source / "chat_template.jinja").write_text("{{ messages }}\n\n  ")
    run_export(EXPORTER, source, tmp_path / "out", dtype="bfloat16")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["head_dim"] == 32
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500000.0
    assert config["rope_scaling"]["rope_type"] == config["rope_parameters"]["rope_type"] == "llama3"
    assert (tmp_path / "out" / "generation_config.json").is_file()
    copied = [n for n in TOKENIZER_FILES if (source / n).is_file()]
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= set(copied)
    for name in copied:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_cast_rounds_and_nothing_more(
    dtype: str, pico: PicoMaker, run_export: RunExport, tmp_path: Path
) -> None:
    source = pico("qwen2", dtype="bfloat16" if dtype == "float32" else "float32")
    report = run_export(EXPORTER, source, tmp_path / "out", dtype=dtype)
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    for name in before.entries:
        assert torch.equal(after.read(name), before.read(name).to(getattr(torch, dtype)))
    difference = report.checks[2].measured
    if dtype == "float32":
        assert difference["max_abs"] == 0.0
    else:
        assert 0 < difference["mean_abs"] < 0.02
        assert difference["kl"] < 1e-3


def test_a_value_that_the_dtype_cannot_hold_is_named(
    pico: PicoMaker, run_export: RunExport, tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    source = pico(num_hidden_layers=2)
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {name: tensors[name] * 1e6}, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ParetronError) as caught:
        run_export(EXPORTER, source, tmp_path / "out", dtype="float16")
    assert caught.value.problems[0].code is Code.GATE_NONFINITE
    assert name in caught.value.problems[0].where
    assert not (tmp_path / "out").exists()


def test_a_shape_that_llama_refuses(pico: PicoMaker, run_export: RunExport, tmp_path: Path) -> None:
    """44 channels and 6 heads: fine under Mistral's name, and no name takes it with biases."""
    shape = {"hidden_size": 44, "num_attention_heads": 6, "num_key_value_heads": 2}
    source = pico("mistral", **shape)
    run_export(EXPORTER, source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["sliding_window"] is None
    assert torch.equal(logits(tmp_path / "out"), logits(source))
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    assert EXPORTER.problems(config, export=Export(to="hf")) == []
    (problem,) = EXPORTER.problems(config | {"attention_bias": True}, export=Export(to="hf"))
    assert (problem.code, problem.code.exit) == (Code.UNSUPPORTED, 6)


@pytest.mark.parametrize("family", ["llama", "nemotron"])
@pytest.mark.parametrize(
    "tensor", ["model.layers.1.self_attn.k_proj.weight", "model.norm.weight", "lm_head.weight"]
)
def test_an_error_of_a_hundredth_in_one_tensor_is_caught(
    family: str, tensor: str, pico: PicoMaker, run_export: RunExport, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    write = TensorWriter.write

    def wrong(self: TensorWriter, name: str, value: torch.Tensor) -> None:
        write(self, name, value + 1e-2 if name == tensor else value)

    source = pico(family, num_hidden_layers=2)
    monkeypatch.setattr(TensorWriter, "write", wrong)
    with pytest.raises(ParetronError) as caught:
        run_export(EXPORTER, source, tmp_path / "out")
    assert caught.value.exit_code == 5
    assert caught.value.problems[0].code is Code.GATE_PARITY
    assert caught.value.problems[0].where == tensor
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == ["model"]


def test_a_config_that_computes_something_else_is_caught_by_logits(
    pico: PicoMaker, run_export: RunExport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    servable = hf.servable_config

    def wrong(config: dict[str, Any], *, dtype: str) -> dict[str, Any]:
        return servable(config | {"rms_norm_eps": 1e-2}, dtype=dtype)

    source = pico(num_hidden_layers=2)
    monkeypatch.setattr(hf, "servable_config", wrong)
    with pytest.raises(ParetronError) as caught:
        run_export(EXPORTER, source, tmp_path / "out")
    assert {p.code for p in caught.value.problems} == {Code.GATE_PARITY}
    assert "L2 logits" in caught.value.problems[0].cause
    assert caught.value.problems[0].where.startswith("prompt ")


def test_what_cannot_be_read_back_is_a_failed_gate(
    pico: PicoMaker, run_export: RunExport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = TensorWriter.__exit__

    def cut(self: TensorWriter, *error: Any) -> None:
        finish(self, *error)
        file = self._folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])

    source = pico(num_hidden_layers=2)
    monkeypatch.setattr(TensorWriter, "__exit__", cut)
    with pytest.raises(ParetronError) as caught:
        run_export(EXPORTER, source, tmp_path / "out")
    assert (caught.value.problems[0].code, caught.value.exit_code) == (Code.GATE_RELOAD, 5)
    assert not (tmp_path / "out").exists()


def test_a_failed_export_leaves_the_old_one(
    pico: PicoMaker, run_export: RunExport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = pico(num_hidden_layers=2)
    run_export(EXPORTER, source, tmp_path / "out")
    before = read_manifest(tmp_path / "out")
    write = TensorWriter.write
    monkeypatch.setattr(TensorWriter, "write", lambda s, n, t: write(s, n, t + 1e-2))
    with pytest.raises(ParetronError):
        run_export(EXPORTER, source, tmp_path / "out", overwrite=True)
    assert verify(tmp_path / "out") == before


def test_shards_tied_embeddings_and_the_same_bytes_twice(
    pico: PicoMaker, run_export: RunExport, tmp_path: Path
) -> None:
    source = pico("qwen3", tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(source)
    (source / "model.safetensors").unlink()
    model.save_pretrained(source, max_shard_size="100KB")
    assert len(list(source.glob("model-*.safetensors"))) > 2
    run_export(EXPORTER, source, tmp_path / "a")
    run_export(EXPORTER, source, tmp_path / "b")
    assert torch.equal(logits(tmp_path / "a"), logits(source))
    assert read_manifest(tmp_path / "a") == read_manifest(tmp_path / "b")


def test_the_card_says_what_cannot_load_it(
    pico: PicoMaker, run_export: RunExport, tmp_path: Path
) -> None:
    run_export(EXPORTER, pico("qwen2", num_hidden_layers=2), tmp_path / "qwen2")
    card = (tmp_path / "qwen2" / "README.md").read_text()
    assert "vLLM (0.32) cannot load it" in card
    assert "from vllm" not in card
    assert "import sglang" not in card
    assert "own tests: TensorRT-LLM." in card
    assert "from tensorrt_llm" in card
    run_export(EXPORTER, pico("qwen3", name="other", num_hidden_layers=2), tmp_path / "qwen3")
    card = (tmp_path / "qwen3" / "README.md").read_text()
    for engine in ("from transformers", "from vllm", "import sglang", "from tensorrt_llm"):
        assert engine in card
    assert "**TEST**" in card
