"""The hf exporter and large models: shards, parts of tensors, and a twin in place of the whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from makers import PicoMaker
from paretron.artifacts import passing, rows
from paretron.artifacts.manifest import sha256_file, verify
from paretron.artifacts.reader import Checkpoint
from paretron.artifacts.writer import TensorWriter
from paretron.errors import Code, ParetronError
from paretron.recipe import Export
from paretron_exporters import hf, twin
from paretron_exporters.hf import EXPORTER
from paretron_exporters.transformers_engine import observe_transformers
from paretron_exporters.twin import fits, twin_model, twin_of

RunExport = Callable[..., Any]


@pytest.fixture
def too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is small enough to be run as a whole, and every axis that may be cut is."""
    monkeypatch.setattr(twin, "WHOLE_BYTES", 0)
    monkeypatch.setattr(twin, "_CUT", {"vocab": 100, "ffn": 40, "moe_ffn": 16})


@pytest.mark.parametrize("shard_bytes", [20_000, 100_000])
def test_shards_are_as_large_as_asked_for(
    shard_bytes: int, pico: PicoMaker, run_export: RunExport, tmp_path: Path
) -> None:
    source = pico(num_hidden_layers=2)
    run_export(EXPORTER, source, tmp_path / "out", shard_bytes=shard_bytes)
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    tensors = [load_file(f) for f in files]
    assert len(files) > 3
    for held in tensors:
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= shard_bytes
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {f.name for f in files}
    before = load_file(source / "model.safetensors")
    after = {n: t for held in tensors for n, t in held.items()}
    assert before.keys() == after.keys()
    assert all(torch.equal(after[n], before[n]) for n in before)
    verify(tmp_path / "out")


def test_what_was_hashed_on_the_way_is_what_lies_there(
    pico: PicoMaker, run_export: RunExport, tmp_path: Path
) -> None:
    run_export(EXPORTER, pico(num_hidden_layers=2), tmp_path / "out", dtype="bfloat16")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    said = manifest["files"]["model.safetensors"]["sha256"]
    assert said == sha256_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_tensor_passes_in_parts(
    dtype: str | None, pico: PicoMaker, run_export: RunExport, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def small(entry: Any) -> Any:
        return rows.row_blocks(entry, block_bytes=1000)

    source = pico(num_hidden_layers=2)
    run_export(EXPORTER, source, tmp_path / "whole", dtype=dtype)
    monkeypatch.setattr("paretron_exporters.hf_weights.row_blocks", small)
    report = run_export(EXPORTER, source, tmp_path / "parts", dtype=dtype)
    assert report.checks[1].measured["tensors"] == len(Checkpoint.open(source).entries)
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "parts")]
    assert sha256_file(files[0]) == sha256_file(files[1])
    assert passing.BLOCK_BYTES > 1000


def test_an_error_in_one_part_is_seen(
    pico: PicoMaker, run_export: RunExport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the embedding the last rows alone are written wrong."""
    write, name = TensorWriter.write, "model.embed_tokens.weight"

    def wrong(self: TensorWriter, tensor: str, part: torch.Tensor) -> None:
        self.parts = getattr(self, "parts", 0) + (tensor == name)  # type: ignore[attr-defined]
        last = tensor == name and self.parts == 80  # type: ignore[attr-defined]
        write(self, tensor, part + 1e-2 if last else part)

    monkeypatch.setattr(
        "paretron_exporters.hf_weights.row_blocks",
        lambda entry: rows.row_blocks(entry, block_bytes=1024),
    )
    source = pico(num_hidden_layers=2)
    monkeypatch.setattr(TensorWriter, "write", wrong)
    with pytest.raises(ParetronError) as caught:
        run_export(EXPORTER, source, tmp_path / "out")
    (problem,) = caught.value.problems
    assert (problem.code, problem.where) == (Code.GATE_PARITY, name)
    assert "different 1," in problem.cause
    assert not (tmp_path / "out").exists()


# Each for something that the others lack: kinds of layers, joined matrices, caps, experts.
TWINS = ("llama", "nemotron", "gemma2", "gemma3_text", "phi3", "smollm3", "mixtral", "qwen3_moe")


@pytest.mark.parametrize("family", TWINS)
@pytest.mark.usefixtures("too_large")
def test_a_twin_stands_for_a_model(
    family: str, pico: PicoMaker, run_export: RunExport, tmp_path: Path
) -> None:
    source = pico(family, num_hidden_layers=5)
    report = run_export(EXPORTER, source, tmp_path / "out")
    assert report.checks[1].measured["max_abs"] == 0.0
    assert [c.level for c in report.checks] == ["L0", "L1", "L2", "L3", "L4"]
    logits = report.checks[2]
    assert logits.measured["max_abs"] == 0.0
    assert logits.measured["spread"] > 0.1
    assert logits.about.startswith("logits, layers 1, ")
    assert "100 of vocab" in logits.about
    assert logits.about in (tmp_path / "out" / "README.md").read_text().replace("\\", "")


def test_a_twin_that_leaves_nothing_out_is_the_model(
    pico: PicoMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(twin, "_CUT", {})
    source = pico("gemma2", num_hidden_layers=2)
    checkpoint = Checkpoint.open(source)
    prompts = (tuple(range(3, 90)),)
    whole = observe_transformers(source, prompts)
    again = observe_transformers(twin_model(checkpoint, twin_of(checkpoint)), prompts)
    assert (whole.full[0] == again.full[0]).all()
    assert whole.greedy == again.greedy


@pytest.mark.usefixtures("too_large")
def test_one_layer_of_each_kind(pico: PicoMaker) -> None:
    assert twin_of(Checkpoint.open(pico(name="a"))).layers == (0, 3)
    mixed = Checkpoint.open(pico("gemma3_text", name="b", num_hidden_layers=6))
    assert twin_of(mixed).layers == (0, 1, 5)
    experts = Checkpoint.open(pico("qwen3_moe", name="c"))
    assert twin_of(experts).layers == (0, 1, 3)


@pytest.mark.usefixtures("too_large")
def test_a_twin_sees_a_config_that_computes_something_else(
    pico: PicoMaker, run_export: RunExport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    servable = hf.servable_config

    def wrong(config: dict[str, Any], *, dtype: str) -> dict[str, Any]:
        return servable(config | {"rope_theta": 500.0, "rope_parameters": None}, dtype=dtype)

    source = pico(num_hidden_layers=3)
    monkeypatch.setattr(hf, "servable_config", wrong)
    with pytest.raises(ParetronError) as caught:
        run_export(EXPORTER, source, tmp_path / "out")
    assert {p.code for p in caught.value.problems} == {Code.GATE_PARITY}
    assert "L2 logits" in caught.value.problems[0].cause


def test_what_fits_is_run_as_a_whole(pico: PicoMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(pico(num_hidden_layers=2, dtype="bfloat16"))
    assert fits(checkpoint)
    monkeypatch.setattr(twin, "WHOLE_BYTES", 2 * checkpoint.nbytes)
    assert fits(checkpoint)
    monkeypatch.setattr(twin, "WHOLE_BYTES", 2 * checkpoint.nbytes - 1)
    assert not fits(checkpoint)


def test_the_size_of_shards_is_taken() -> None:
    asked = Export(to="hf", shard_bytes=10**9)
    assert EXPORTER.problems({"model_type": "llama", "hidden_size": 64, "vocab_size": 320,
        "num_hidden_layers": 2, "intermediate_size": 96, "num_attention_heads": 4,
        }, export=asked) == []  # fmt: skip
