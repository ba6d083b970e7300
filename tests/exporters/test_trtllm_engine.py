"""The writer for TensorRT-LLM's engine builder: every layout is the model, and nothing else is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from paretron.artifacts.manifest import verify
from paretron.artifacts.reader import Checkpoint
from paretron.data.texts import Texts
from paretron.errors import Code, ParetronError
from paretron.families import FAMILIES
from paretron.recipe import Export
from paretron_exporters import trtllm_ranks
from paretron_exporters.trtllm_build import BUILDER
from paretron_exporters.trtllm_config import checkpoint_config
from paretron_exporters.trtllm_engine import EXPORTER
from paretron_exporters.trtllm_gates import Proof
from paretron_exporters.trtllm_layout import Layout
from trtllmcases import export_engine, random_texts, ranks_of, tensors_of

PicoMaker = Callable[..., Path]
PICO = {
    "hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 96, "vocab_size": 320,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 512, "rope_theta": 1e4, "sliding_window": None,
}  # fmt: skip
ACTIVATIONS = {"nemotron": "relu2", "gemma2": "gelu_pytorch_tanh"}


@pytest.fixture
def texts(tmp_path: Path) -> Texts:
    """A calibration text."""
    return random_texts(tmp_path / "tokens")


@pytest.fixture(autouse=True)
def _no_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine has, a test says itself when there is a builder."""
    kept = [p for p in os.environ["PATH"].split(os.pathsep) if not (Path(p) / BUILDER).exists()]
    monkeypatch.setenv("PATH", os.pathsep.join(kept))


# ---- what the builder is told


def test_rotary_embeddings_are_not_lost(pico: PicoMaker, tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }  # fmt: skip
    source = pico(num_hidden_layers=2, rope_parameters={"rope_theta": 5e5} | scaling)
    export_engine(source, tmp_path / "out")
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert told["rotary_base"] == 5e5
    assert told["rotary_scaling"] == {**scaling, "type": "llama3"}
    assert told["rotary_pct"] == 1.0


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", {"architecture": "LlamaForCausalLM", "hidden_act": "silu", "attn_bias": False}),
        ("mistral", {"architecture": "MistralForCausalLM", "norm_epsilon": 1e-6}),
        ("qwen2", {"architecture": "Qwen2ForCausalLM", "qwen_type": "qwen2", "attn_bias": True}),
        ("qwen3", {"architecture": "Qwen3ForCausalLM", "qwen_type": "qwen3", "attn_bias": False}),
        ("nemotron", {
            "architecture": "NemotronForCausalLM", "hidden_act": "squared-relu", "bias": False,
            "rotary_pct": 0.5, "norm_epsilon": 1e-5,
        }),
    ],
)  # fmt: skip
def test_what_a_model_class_is_told(family: str, expected: dict[str, Any], pico: PicoMaker) -> None:
    config = Checkpoint.open(pico(family)).config
    told = checkpoint_config(FAMILIES[family], config, Layout(2, 2), dtype="bfloat16", fp8=False)
    shape = {
        "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_size": 32,
        "num_key_value_heads": 2, "num_hidden_layers": 4, "vocab_size": 320, "dtype": "bfloat16",
        "max_position_embeddings": 512, "position_embedding_type": "rope_gpt_neox",
        "rotary_base": 10000.0, "rotary_scaling": None,
    }  # fmt: skip
    wanted = shape | expected
    assert {key: told[key] for key in wanted} == wanted


@pytest.mark.parametrize(
    ("family", "changes", "section", "code", "said"),
    [
        ("llama", {}, {"tensor_parallel": 3}, Code.RECIPE_VALUE, "heads is 4"),
        ("llama", {"intermediate_size": 97}, {"tensor_parallel": 2}, Code.RECIPE_VALUE, "ffn is"),
        ("llama", {}, {"pipeline_parallel": 5}, Code.RECIPE_VALUE, "4 layers"),
        ("gemma2", {}, {}, Code.UNSUPPORTED, "no gemma2"),
        ("llama", {}, {"quantize": "int8"}, Code.UNSUPPORTED, "int8"),
        ("llama", {}, {"backend": "vllm"}, Code.UNSUPPORTED, "backend"),
        ("llama", {"intermediate_size": 104}, {"quantize": "fp8"}, Code.UNSUPPORTED, "104 x 64"),
        ("mistral", {"sliding_window": 64}, {}, Code.UNSUPPORTED, "a window of 64"),
        ("qwen3", {"attention_bias": True}, {}, Code.UNSUPPORTED, "biases"),
        ("nemotron", {"mlp_bias": True}, {}, Code.UNSUPPORTED, "biases"),
        ("llama", {"hidden_act": "gelu"}, {}, Code.UNSUPPORTED, "gelu"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, {},
         Code.UNSUPPORTED, "yarn"),
        ("llama", {}, {"build": True}, Code.OPTIONAL_MISSING, BUILDER),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_told_at_plan_time(
    family: str, changes: dict[str, Any], section: dict[str, Any], code: Code, said: str,
) -> None:  # fmt: skip
    config = PICO | {"model_type": family, "hidden_act": ACTIVATIONS.get(family, "silu")} | changes
    problems = EXPORTER.problems(config, export=Export(to="trtllm_engine", **section))
    assert {p.code for p in problems} == {code}
    assert any(said in p.cause for p in problems)
    assert all(p.fix for p in problems)


# ---- gates


@pytest.mark.parametrize("quantize", [None, "fp8"])
@pytest.mark.parametrize(
    "tensor",
    ["model.layers.2.self_attn.v_proj.weight", "model.norm.weight", "model.embed_tokens.weight",
     "model.layers.0.mlp.down_proj.weight"],
)  # fmt: skip
def test_an_error_of_a_hundredth_in_one_tensor_is_caught(
    tensor: str, quantize: str | None, pico: PicoMaker, tmp_path: Path,
    texts: Texts, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    blocks = trtllm_ranks.source_blocks

    def off(checkpoint: Checkpoint, piece: Any) -> Any:
        for block in blocks(checkpoint, piece):
            yield block + 0.01 if piece.name == tensor else block

    monkeypatch.setattr(trtllm_ranks, "source_blocks", off)
    with pytest.raises(ParetronError) as caught:
        export_engine(
            pico("llama"), tmp_path / "out", quantize=quantize, texts=texts, tensor_parallel=2
        )
    problem = caught.value.problems[0]
    assert (problem.code, problem.code.exit) == (Code.GATE_PARITY, 5)
    assert problem.where.startswith(f"{tensor}, stored in ")
    assert [p.name for p in tmp_path.iterdir() if "out" in p.name] == []


def test_heads_given_to_the_wrong_rank_are_caught(
    pico: PicoMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = trtllm_ranks.rank_targets
    monkeypatch.setattr(
        trtllm_ranks, "rank_targets", lambda *a, stage, rank: plan(*a, stage=stage, rank=1 - rank)
    )
    with pytest.raises(ParetronError) as caught:
        export_engine(pico("llama"), tmp_path / "out", tensor_parallel=2)
    assert caught.value.problems[0].code is Code.GATE_PARITY


def test_a_tensor_that_nobody_compared_is_caught(
    pico: PicoMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    see = Proof.see

    def blind(self: Proof, stage: int, name: str, files: Any) -> None:
        if name != "transformer.layers.1.attention.qkv.weight":
            see(self, stage, name, files)

    monkeypatch.setattr(Proof, "see", blind)
    with pytest.raises(ParetronError) as caught:
        export_engine(pico("llama"), tmp_path / "out", tensor_parallel=2)
    assert caught.value.problems[0].code is Code.GATE_PARITY
    where = caught.value.problems[0].where
    assert where.endswith(", stored in transformer.layers.1.attention.qkv.weight")


# ---- FP8


def test_fp8_scales_are_the_largest_value_by_448(
    pico: PicoMaker, tmp_path: Path, texts: Texts
) -> None:
    from transformers import AutoModelForCausalLM

    from paretron.data.store import TokenStore, sample_windows

    source = pico("llama", num_hidden_layers=2, dtype="bfloat16")
    report = export_engine(
        source, tmp_path / "out", quantize="fp8", texts=texts, tensor_parallel=2,
        pipeline_parallel=2,
    )  # fmt: skip
    assert [c.level for c in report.checks] == ["L0", "L0", "L1", "L1", "L1"]
    stages = ranks_of(tmp_path / "out", 2, 2)
    weights = {n: t.float() for n, t in tensors_of(source).items()}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    seen: dict[str, float] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _m, a, n=name: seen.update(
                    {n: max(seen.get(n, 0.0), float(a[0].abs().max()))}
                )
            )
    store = TokenStore.open(texts.calibration)
    for window in sample_windows(store, texts.samples, texts.calibration_seq_len, texts.seed):
        with torch.inference_mode():
            model(window[None])
    groups = {
        "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.dense": ("self_attn.o_proj",),
        "mlp.fc": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.gate": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.proj": ("mlp.down_proj",),
    }
    for layer, files in enumerate(stages):
        for tensors in files:
            for module, parts in groups.items():
                stored = tensors[f"transformer.layers.0.{module}.weight"]
                assert stored.dtype == torch.float8_e4m3fn
                full = [f"model.layers.{layer}.{part}" for part in parts]
                amax = max(float(weights[f"{n}.weight"].abs().max()) for n in full)
                scale = tensors[f"transformer.layers.0.{module}.weights_scaling_factor"]
                assert scale.shape == (1,)
                assert float(scale) == pytest.approx(amax / 448, rel=1e-6)
                inputs = tensors[f"transformer.layers.0.{module}.activation_scaling_factor"]
                assert float(inputs) == pytest.approx(seen[full[0]] / 448, rel=1e-6)
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert told["quantization"]["quant_algo"] == "FP8"
    assert told["dtype"] == "bfloat16"
    assert stages[1][0]["lm_head.weight"].dtype == torch.bfloat16
    dense = (
        torch.cat(
            [t["transformer.layers.0.attention.dense.weight"].float() for t in stages[0]], dim=1
        )
        * stages[0][0]["transformer.layers.0.attention.dense.weights_scaling_factor"]
    )
    source_dense = weights["model.layers.0.self_attn.o_proj.weight"]
    assert 0 < float((dense - source_dense).norm() / source_dense.norm()) < 0.03


def test_fp8_without_a_text_asks_for_one(pico: PicoMaker, tmp_path: Path) -> None:
    with pytest.raises(ParetronError) as caught:
        export_engine(pico("llama"), tmp_path / "out", quantize="fp8")
    assert caught.value.problems[0].code is Code.USAGE
    assert "--recipe" in caught.value.problems[0].fix


# ---- the builder


def fake_builder(folder: Path, monkeypatch: pytest.MonkeyPatch, *, fails: bool) -> Path:
    """A program of the builder's name that notes its arguments and writes what it is told to."""
    folder.mkdir()
    program = folder / BUILDER
    ending = (
        "echo 'CUDA error: no device'; exit 3"
        if fails
        else "mkdir engine; touch engine/rank0.engine"
    )
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {folder}/argv\n{ending}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder / "argv"


def test_the_engine_is_built_where_its_builder_is(
    pico: PicoMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = fake_builder(tmp_path / "bin", monkeypatch, fails=False)
    serving = {"max_batch_size": 4, "max_num_tokens": 1024, "max_seq_len": 256}
    export_engine(pico("llama"), tmp_path / "out", build=True, serving=serving)
    assert argv.read_text().split() == [
        "--checkpoint_dir", ".", "--output_dir", "engine", "--gemm_plugin", "auto",
        "--max_batch_size", "4", "--max_input_len", "255", "--max_seq_len", "256",
        "--max_num_tokens", "1024",
    ]  # fmt: skip
    assert (tmp_path / "out" / "engine" / "rank0.engine").is_file()
    verify(tmp_path / "out")


def test_a_builder_that_fails_publishes_nothing(
    pico: PicoMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_builder(tmp_path / "bin", monkeypatch, fails=True)
    with pytest.raises(ParetronError) as caught:
        export_engine(pico("llama"), tmp_path / "out")
    (problem,) = caught.value.problems
    assert (problem.code, problem.code.exit) == (Code.ENGINE, 4)
    assert "CUDA error: no device" in problem.cause
    assert not (tmp_path / "out").exists()


def test_without_a_builder_the_command_is_left(
    pico: PicoMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    export_engine(pico("llama"), tmp_path / "out", notes=notes)
    assert any("no engine was built" in note for note in notes)
    argv = fake_builder(tmp_path / "bin", monkeypatch, fails=False)
    subprocess.run([str(tmp_path / "out" / "build_engine.sh")], check=True, cwd="/")
    assert argv.read_text().split()[:4] == ["--checkpoint_dir", ".", "--output_dir", "engine"]
    assert (tmp_path / "out" / "engine").is_dir()
    assert shutil.which(BUILDER)
