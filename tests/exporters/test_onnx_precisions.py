"""ONNX in fewer bits: what the graph holds is the nearest to the source, and runs as it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from paretron.errors import Code, ParetronError
from paretron_exporters import genai
from paretron_exporters.onnx import EXPORTER
from paretron_exporters.onnx_file import read_graph

pytest.importorskip("onnxruntime_genai")

PicoMaker = Callable[..., Path]
RunExport = Callable[..., Any]

FORMS = {
    "int8": {"quantize": "int8"},
    "int4": {"quantize": "int4"},
    "cuda float16": {"device": "cuda", "dtype": "float16"},
    "cuda bfloat16": {"device": "cuda", "dtype": "bfloat16"},
    "cuda int8": {"device": "cuda", "quantize": "int8"},
    "cuda int4": {"device": "cuda", "quantize": "int4"},
}
LOGITS = "L2 logits"
OF_CODES = "L2 logits of the quantised weights in transformers"


def checks(report: Any) -> dict[str, Any]:
    return {f"{c.level} {c.about}": c for c in report.checks}


# Tied: the head is rounded, the embedding is not. 48: rows end within a block.
@pytest.mark.parametrize("form", FORMS)
def test_a_tied_llama_with_broken_blocks(
    form: str, pico: PicoMaker, run_export: RunExport, tmp_path: Path
) -> None:
    source = pico(num_hidden_layers=1, hidden_size=48, tie_word_embeddings=True)
    report = run_export(EXPORTER, source, tmp_path / "out", **FORMS[form])
    found = checks(report)
    assert found["L1 weights"].measured["max_abs"] == 0.0
    if "int" in form:
        assert found["L1 scales of blocks, relative"].measured["max_abs"] < 2e-3
        assert 0.4 < found["L1 quantised weights, in steps"].measured["max_abs"] < 0.57
        # Kernels for the CPU round activations too; those for CUDA run in float16.
        assert found[OF_CODES].measured["kl"] < 2e-3
    if form == "cuda bfloat16":
        assert LOGITS not in found  # no kernels here, and the card says so
        assert "was not run" in (tmp_path / "out" / "README.md").read_text()
    else:
        assert {"L3", "L4"} <= {c.level for c in report.checks}
        bound = {"int4": 1.0, "int8": 1e-2}.get(form.removeprefix("cuda "), 1e-4)
        assert found[LOGITS].measured["kl"] < bound


@pytest.mark.parametrize("family", ["phi3", "nemotron", "gemma2"])
def test_families_that_the_builder_stores_otherwise(
    family: str, pico: PicoMaker, run_export: RunExport, tmp_path: Path
) -> None:
    """Phi-3's fused matrix is taken apart, Nemotron has biases, Gemma's norms stay in float32."""
    source = pico(family, num_hidden_layers=1)
    report = run_export(EXPORTER, source, tmp_path / "out", device="cuda", quantize="int4")
    assert checks(report)[OF_CODES].measured["kl"] < 1e-4


PART = "model.layers.1.mlp.down_proj.MatMul.weight"


@pytest.mark.parametrize(
    ("form", "stored", "about"),
    [
        ("int8", f"{PART}_scales", "scales of blocks"),
        ("int8", f"{PART}_Q8", "quantised weights"),
        ("int4", f"{PART}_scales", "scales of blocks"),
        ("int4", f"{PART}_Q4", "quantised weights"),
        ("cuda float16", PART, "weights"),
        ("cuda bfloat16", PART, "weights"),
    ],
)
def test_an_error_of_a_hundredth_in_one_tensor_is_caught(
    form: str, stored: str, about: str, pico: PicoMaker, run_export: RunExport, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    build = genai.build

    def wrong(checkpoint: Any, folder: Path, **told: Any) -> None:
        build(checkpoint, folder, **told)
        weight = read_graph(folder / "model.onnx").initialisers[stored]
        data = bytearray(weight.file.read_bytes())
        values = weight.read().clone()
        if values.is_floating_point():
            values += 1e-2 * (values.abs().max() if "scales" in stored else 1)
        else:
            values[0, 0, 0] += 17 if "Q4" in stored else 2  # the next code, in both halves
        raw = values.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        data[weight.start : weight.start + len(raw)] = raw
        weight.file.write_bytes(data)

    source = pico(num_hidden_layers=2)
    monkeypatch.setattr(genai, "build", wrong)
    with pytest.raises(ParetronError) as caught:
        run_export(EXPORTER, source, tmp_path / "out", **FORMS[form])
    problem = caught.value.problems[0]
    assert (problem.code, caught.value.exit_code) == (Code.GATE_PARITY, 5)
    assert problem.where == "model.layers.1.mlp.down_proj.weight"
    assert about in problem.cause
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_off_by_a_hundredth_shows_in_its_scales(
    pico: PicoMaker, run_export: RunExport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Less than half a step of 4 bits: the codes alone could not tell."""
    build = genai.build
    source = pico(num_hidden_layers=2)
    spoilt = pico(num_hidden_layers=2, name="spoilt")
    file = spoilt / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"] += 1e-2
    save_file(tensors, file, metadata={"format": "pt"})

    def wrong(checkpoint: Any, folder: Path, **told: Any) -> None:
        build(type(checkpoint).open(spoilt), folder, **told)

    monkeypatch.setattr(genai, "build", wrong)
    with pytest.raises(ParetronError) as caught:
        run_export(EXPORTER, source, tmp_path / "out", quantize="int4")
    assert caught.value.problems[0].where == "model.layers.0.mlp.up_proj.weight"
    assert "scales of blocks" in caught.value.problems[0].cause


def test_packed_codes_are_read_low_half_first(
    pico: PicoMaker, run_export: RunExport, tmp_path: Path
) -> None:
    run_export(EXPORTER, pico(num_hidden_layers=1), tmp_path / "out", quantize="int4")
    graph = read_graph(tmp_path / "out" / "model.onnx")
    name = "model.layers.0.mlp.down_proj.MatMul.weight"
    packed = graph.initialisers[f"{name}_Q4"].read().numpy()
    assert packed.shape == (64, 3, 16)
    assert packed.dtype == np.uint8
    # The weight of largest magnitude has the code 0, so every block has one.
    halves = np.stack((packed & 15, packed >> 4), -1)
    assert (halves.reshape(64, 3, 32).min(-1) == 0).all()
