"""Portable ONNX graphs: plain ONNX Runtime computes the source's model with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from paretron.artifacts.models import load_model
from paretron.artifacts.reader import Checkpoint
from paretron.errors import Code, ParetronError
from paretron_exporters import onnx_portable
from paretron_exporters.onnx import EXPORTER
from paretron_exporters.onnx_file import read_graph
from paretron_exporters.onnx_portable_gates import prove
from pico import make_pico

ort = pytest.importorskip("onnxruntime")

RunExport = Callable[..., Any]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "model"
    return make_pico(folder, "nemotron", num_hidden_layers=1, attention_bias=True)


@pytest.fixture(scope="module")
def traced(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the tracing leaves, once: it is the slow part."""
    folder = tmp_path_factory.mktemp("traced")
    onnx_portable.build(Checkpoint.open(source), folder)
    return folder


@pytest.fixture
def as_traced(traced: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Exports that take a copy of it."""

    def build(checkpoint: Checkpoint, folder: Path) -> None:
        for file in traced.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())

    monkeypatch.setattr(onnx_portable, "build", build)
    return traced


def test_it_is_the_same_model(
    as_traced: Path, source: Path, run_export: RunExport, tmp_path: Path
) -> None:
    report = run_export(EXPORTER, source, tmp_path / "out", backend="portable")
    assert [c.level for c in report.checks] == ["L0", "L1", "L0"] * 2 + ["L2", "L3", "L4"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md", "decode.onnx", "manifest.json", "model.onnx.data", "parity.json",
        "prefill.onnx", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


def test_a_loop_of_ones_own_gives_the_same_logits(traced: Path, source: Path) -> None:
    prefill, decode = (ort.InferenceSession(traced / f"{n}.onnx") for n in ("prefill", "decode"))
    ids = np.random.default_rng(1).integers(0, 320, (1, 40))
    with torch.inference_mode():
        expected = load_model(source)(torch.tensor(ids)).logits[0].numpy()
    found: list[Any] = []
    cache: dict[str, Any] = {}
    for start, end in ((0, 7), *((k, k + 1) for k in range(7, 40))):
        session = decode if start else prefill
        feed = {"input_ids": ids[:, start:end], "position_ids": np.arange(start, end)[None]}
        names = [o.name for o in session.get_outputs()]
        out = dict(zip(names, session.run(None, feed | cache), strict=True))
        found.append(out.pop("logits")[0])
        cache = {n.replace("output", "input", 1): v for n, v in out.items()}
    assert np.abs(np.concatenate(found) - expected).max() < 1e-4


def test_the_graphs_are_standard_and_say_nothing_of_this_machine(traced: Path) -> None:
    data = (traced / "model.onnx.data").stat().st_size
    weights = sum(p.numel() * 4 for p in load_weights(traced))
    assert data < 1.1 * weights  # shared by both graphs
    for name in ("prefill", "decode"):
        file = traced / f"{name}.onnx"
        model = onnx.load(file, load_external_data=False)
        assert [(o.domain, o.version) for o in model.opset_import] == [("", 22)]
        assert model.ir_version <= 10
        assert b"site-packages" not in file.read_bytes()
        onnx.checker.check_model(str(file))


def load_weights(traced: Path) -> list[torch.Tensor]:
    graph = read_graph(traced / "prefill.onnx", constants=True)
    return [i.read() for i in graph.initialisers.values()]


@pytest.mark.parametrize("part", ["mlp.down_proj.weight", "input_layernorm.weight"])
def test_an_error_of_a_hundredth_in_one_tensor_is_caught(
    part: str, traced: Path, source: Path, tmp_path: Path
) -> None:
    for file in traced.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    checkpoint = Checkpoint.open(source)
    name = f"model.layers.0.{part}"
    own = checkpoint.read(name)
    forms = (own.t(), own, own + 1) if own.dim() == 2 else (own, own + 1)
    raw = next(
        f.contiguous().numpy().tobytes()
        for f in forms
        if f.contiguous().numpy().tobytes() in (tmp_path / "model.onnx.data").read_bytes()
    )
    data = (tmp_path / "model.onnx.data").read_bytes()
    wrong = (np.frombuffer(raw, np.float32) + np.float32(1e-2)).tobytes()
    (tmp_path / "model.onnx.data").write_bytes(data.replace(raw, wrong))
    with pytest.raises(ParetronError) as caught:
        prove(checkpoint, tmp_path)
    assert caught.value.problems[0].code is Code.GATE_PARITY
    assert caught.value.problems[0].where == name


def test_a_weight_that_is_none_of_the_sources_is_caught(
    traced: Path, source: Path, tmp_path: Path
) -> None:
    for file in traced.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model = onnx.load(tmp_path / "decode.onnx", load_external_data=False)
    stranger = model.graph.initializer.add()
    stranger.CopyFrom(next(t for t in model.graph.initializer if t.external_data))
    stranger.name = "stranger"
    stranger.dims[:] = stranger.dims[::-1]
    (tmp_path / "decode.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ParetronError) as caught:
        prove(Checkpoint.open(source), tmp_path)
    assert [p.where for p in caught.value.problems] == ["stranger"]
