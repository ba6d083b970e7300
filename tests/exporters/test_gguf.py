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
from paretron_exporters.gguf import EXPORTER, FAMILIES, FILE
from paretron_exporters.gguf_file import ROPE_FREQS, rope_factors
from paretron_exporters.gguf_tokenizer import CONTROL, NORMAL, UNUSED

PicoMaker = Callable[..., Path]
RunExport = Callable[..., Any]

IDS = torch.arange(3, 90)[None]
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 128,
}  # fmt: skip


def settings(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("quantize", [None, "q8_0"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_the_same_model(
    family: str, quantize: str | None, pico: PicoMaker, run_export: RunExport, tmp_path: Path
) -> None:
    report = run_export(EXPORTER, pico(family), tmp_path / "out", quantize=quantize)
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


def test_transformers_reads_it_as_the_same_llama(
    pico: PicoMaker, run_export: RunExport, tmp_path: Path
) -> None:
    """Another reader undoes the order of rows, so ours is not held to itself alone."""
    source = pico("llama")
    run_export(EXPORTER, source, tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file=FILE, dtype=torch.float32
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
    order = gguf_file.to_gguf_rows

    def spoilt(name: str, tensor: torch.Tensor, checkpoint: Checkpoint) -> torch.Tensor:
        return order(name, tensor + 0.01 * ("layers.1.mlp.up_proj" in name), checkpoint)

    monkeypatch.setattr(gguf_file, "to_gguf_rows", spoilt)
    for quantize in (None, "q8_0"):
        source = pico("llama", name=f"{quantize}")
        with pytest.raises(ParetronError) as caught:
            run_export(EXPORTER, source, tmp_path / "o", quantize=quantize)
        assert caught.value.problems[0].code is Code.GATE_PARITY
        assert caught.value.problems[0].where == "model.layers.1.mlp.up_proj.weight"
        assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("changes", "quantize", "names"),
    [
        ({"model_type": "nemotron"}, None, "no nemotron"),
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
