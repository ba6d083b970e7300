"""What the onnx exporter refuses, at plan time, from a config alone."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from paretron.errors import Code, ParetronError
from paretron.recipe import Export
from paretron_exporters import onnx
from paretron_exporters.onnx import EXPORTER
from paretron_exporters.onnx_limits import builder_config, unsupported

LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 3072, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 9216, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}  # fmt: skip
NEMOTRON = LLAMA | {"model_type": "nemotron", "hidden_act": "relu2", "norm_eps": 1e-4}
LINEAR = {"rope_type": "linear", "factor": 8.0}
GEMMA3 = LLAMA | {"model_type": "gemma3_text", "hidden_act": None}
LONG_PHI3 = LLAMA | {
    "model_type": "phi3", "hidden_size": 4096,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64},
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}


@pytest.mark.parametrize(
    ("config", "dtype", "cause", "fix"),
    [
        (LLAMA, "bfloat16", "bfloat16 for cpu", "float16, bfloat16, int8, int4 on cuda"),
        (LLAMA | {"model_type": "olmo2"}, None, "the family olmo2", "supported: llama"),
        (LLAMA | {"model_type": "starcoder2"}, None, "the family starcoder2", "supported: llama"),
        # Its builder of SmolLM3 fails where a layer does not rotate.
        (LLAMA | {"model_type": "smollm3"}, None, "the family smollm3", "phi3, granite"),
        (LONG_PHI3, None, "rope type 'longrope'", "supported for phi3: default"),
        (GEMMA3 | {"rope_scaling": LINEAR}, None, "rope type 'linear'", "for gemma3_text: default"),
        (GEMMA3 | {"hidden_size": 3000}, None, "gemma3_text refuses hidden 3000", "multiple of 32"),
        (LLAMA | {"rope_scaling": YARN}, None, "'yarn'", "default, linear, llama3"),
        (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, None, "'dynamic'", "linear"),
        (NEMOTRON | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, None, "'linear'",
         "supported for nemotron: default"),
        (LLAMA | {"hidden_act": "tanh"}, None, "'tanh'", "silu"),
        (LLAMA | {"head_dim": 40}, None, "head_dim 40", "multiple of 16"),
        (NEMOTRON | {"head_dim": 80}, None, "rotate 40 of 80", "multiple of 16"),
        (NEMOTRON | {"head_dim": 80, "partial_rotary_factor": 0.25}, None, "rotate 20", "16"),
        (NEMOTRON | {"mlp_bias": True}, None, "biases of nemotron's MLP", "without"),
        (LLAMA | {"vocab_size": 9216}, None, "mlp.gate_proj", "another size"),
        (LLAMA | {"vocab_size": 4096}, None, "self_attn.q_proj", "another size"),
        (LLAMA | {"vocab_size": 1024}, None, "self_attn.k_proj", "another size"),
        (LLAMA | {"hidden_size": 3000, "attention_bias": True}, None, "refuses", "multiple of 32"),
    ],
)  # fmt: skip
def test_a_limit_is_told_before_anything_runs(
    config: dict[str, Any], dtype: str | None, cause: str, fix: str
) -> None:
    export = Export.model_validate({"to": "onnx", "dtype": dtype})
    problems = EXPORTER.problems(config, export=export)
    assert problems
    assert {(p.code, p.code.exit) for p in problems} == {(Code.UNSUPPORTED, 6)}
    assert cause in problems[0].cause
    assert fix in problems[0].fix


@pytest.mark.parametrize(
    ("asked", "cause"),
    [
        ({"dtype": "float16"}, "float16 for cpu"),
        ({"device": "cuda", "dtype": "float32"}, "float32 for cuda"),
        ({"quantize": "fp8"}, "fp8 for cpu"),
        ({"backend": "tensorrt"}, "no backend 'tensorrt'"),
        ({"tensor_parallel": 2}, "takes no `tensor_parallel`"),
        ({"backend": "portable", "dtype": "bfloat16"}, "portable onnx cannot export bfloat16"),
        ({"backend": "portable", "quantize": "int8"}, "takes no `quantize`"),
        ({"backend": "portable", "device": "cuda"}, "takes no `device`"),
    ],
)
def test_a_form_that_is_not_offered(asked: dict[str, Any], cause: str) -> None:
    (problem,) = EXPORTER.problems(LLAMA, export=Export.model_validate({"to": "onnx"} | asked))
    assert problem.code is Code.UNSUPPORTED
    assert cause in problem.cause
    assert problem.fix


@pytest.mark.parametrize(
    ("config", "cause"),
    [
        ({"model_type": "mixtral", "num_local_experts": 4}, "the family mixtral"),
        ({"model_type": "mistral"}, "in a window"),  # of 4096, which its config leaves out
        ({"model_type": "starcoder2", "sliding_window": 64}, "in a window"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64}, "in a window"),
        ({"rope_scaling": YARN}, "'yarn'"),
    ],
)
def test_what_has_no_portable_graphs(config: dict[str, Any], cause: str) -> None:
    export = Export(to="onnx", backend="portable")
    (problem,) = EXPORTER.problems(LLAMA | config, export=export)
    assert problem.code is Code.UNSUPPORTED
    assert cause in problem.cause
    assert EXPORTER.problems(LLAMA, export=export) == []


def test_every_problem_at_once() -> None:
    config = LLAMA | {"vocab_size": 9216, "hidden_act": "tanh", "rope_scaling": YARN}
    assert len(unsupported(config, Export(to="onnx", dtype="float16"))) == 5


@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        NEMOTRON,
        LLAMA | {"hidden_size": 3000},  # becomes a Mistral
        LLAMA | {"model_type": "mistral", "sliding_window": 512},
    ],
)
def test_what_can_be_exported_is_no_problem(config: dict[str, Any]) -> None:
    assert EXPORTER.problems(config, export=Export(to="onnx")) == []


def test_what_the_builder_is_told() -> None:
    assert builder_config(NEMOTRON)["rms_norm_eps"] == 1e-4
    assert builder_config(NEMOTRON)["partial_rotary_factor"] == 0.5
    mistral = LLAMA | {"model_type": "mistral"}
    assert builder_config(mistral)["layer_types"] == ["sliding_attention"] * 16  # window 4096
    for window in (None, 8192):
        told = builder_config(mistral | {"sliding_window": window})
        assert told["sliding_window"] is None
        assert "layer_types" not in told
    assert builder_config(LLAMA | {"dtype": "bfloat16"})["dtype"] == "float32"


def test_a_missing_package_is_told_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def without(name: str) -> str:
        if name == "onnxruntime-genai":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.18.0" if name == "onnx" else version(name)

    monkeypatch.setattr(importlib.metadata, "version", without)
    old, missing = EXPORTER.problems(LLAMA, export=Export(to="onnx"))
    assert (missing.code, missing.code.exit) == (Code.OPTIONAL_MISSING, 6)
    assert missing.fix == 'pip install "paretron[onnx]"'
    assert (old.code, old.code.exit) == (Code.OPTIONAL_OLD, 6)
    assert "1.18.0 is older than 1.21" in old.cause


def test_a_package_that_cannot_be_imported_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from paretron_exporters.genai import GenaiEngine

    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    with pytest.raises(ParetronError) as caught:
        GenaiEngine(tmp_path, max_length=1)
    assert (caught.value.problems[0].code, caught.value.exit_code) == (Code.OPTIONAL_MISSING, 6)
    assert caught.value.problems[0].fix == 'pip install "paretron[onnx]"'


def test_the_floors_are_those_of_the_extra() -> None:
    project = Path(__file__).parents[2] / "pyproject.toml"
    extra = tomllib.loads(project.read_text())["project"]["optional-dependencies"]["onnx"]
    assert dict(line.split(">=") for line in extra) == onnx.FLOORS


def test_planning_asks_without_torch() -> None:
    code = (
        "import sys, paretron_exporters.hf, paretron_exporters.onnx\n"
        "print(*{'torch', 'transformers', 'onnx', 'onnxruntime_genai'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
