"""An exporter of someone else's: found by its entry point, like ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from makers import PicoMaker
from paretron.artifacts.manifest import verify
from paretron.cli.main import main
from paretron.errors import Code, ParetronError
from paretron.plugins import EXPORTERS, find_plugin, plugin_names
from paretron.recipe import Export

MODULE = """
from paretron.errors import Code, Problem

class Exporter:
    name = "paper"

    def needs(self, export, *, params, embedding_params):
        return 5 * params, 7 * embedding_params

    def problems(self, config, *, export):
        return [Problem(Code.UNSUPPORTED, f"paper cannot hold {config['model_type']}")]

EXPORTER = Exporter()
"""

WORKING = """
from paretron.artifacts.jsonfile import dump
from paretron.artifacts.reader import Checkpoint
from paretron.artifacts.staging import staged
from paretron.evaluate.parity import ParityReport, check_names, require

class Exporter:
    name = "shapes"

    def needs(self, export, *, params, embedding_params):
        return 5 * params, 7 * embedding_params

    def problems(self, config, *, export):
        return []

    def export(self, source, *, export, out, provenance, texts=None, overwrite=False, on_event):
        shapes = {n: e.shape for n, e in Checkpoint.open(source).entries.items()}
        with staged(out, provenance=provenance, overwrite=overwrite) as folder:
            dump(folder / "shapes.json", shapes)
            report = ParityReport("source", "shapes", (check_names(shapes, shapes),))
            require(report)
            dump(folder / "parity.json", report.as_json())
        return report

EXPORTER = Exporter()
"""
RECIPE = """
schema: 1
teacher: {model: ./model}
data:
  calibration: {corpus: stdlib, part: calibration, seq_len: 64}
  train: {corpus: stdlib, part: train, seq_len: 64}
  validation: {corpus: stdlib, part: validation, seq_len: 64}
students:
  width: {ffn: 64}
distill: {tokens: 1.0e5, global_batch: 8}
export: [{to: TO}]
"""


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    info = tmp_path / "paper_exporter-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: paper-exporter\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[paretron.exporters]\n"
        "paper = paper_exporter_module:EXPORTER\n"
        "torn = paper_exporter_module.needs_more:EXPORTER\n"
        "shapes = paper_exporter_shapes:EXPORTER\n"
    )
    (tmp_path / "paper_exporter_shapes.py").write_text(WORKING)
    (tmp_path / "paper_exporter_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_third_party_exporter_shows_up_and_is_asked(third_party: Path) -> None:
    assert set(plugin_names(EXPORTERS)) >= {"hf", "onnx", "paper"}
    exporter = find_plugin(EXPORTERS, "paper", where="export.0.to")
    (problem,) = exporter.problems({"model_type": "llama"}, export=Export(to="paper"))
    assert problem.cause == "paper cannot hold llama"


def test_one_that_lacks_its_dependency_is_listed_and_says_so(third_party: Path) -> None:
    assert "torn" in plugin_names(EXPORTERS)
    with pytest.raises(ParetronError) as caught:
        find_plugin(EXPORTERS, "torn", where="export.0.to")
    assert (caught.value.problems[0].code, caught.value.exit_code) == (Code.OPTIONAL_MISSING, 6)
    assert "'torn' of paper-exporter" in caught.value.problems[0].cause
    assert "pip install" in caught.value.problems[0].fix


def test_ours_are_registered() -> None:
    for name in ("hf", "onnx", "gguf"):
        exporter = find_plugin(EXPORTERS, name, where="export.0.to")
        assert exporter.name == name


def test_ours_say_what_they_hold() -> None:
    """1000 weights, 400 of them in embedding and head, which the library writes in float32."""
    held = {
        ("hf", None): (0, 0), ("hf", "int8"): (0, 0), ("hf", "fp8"): (4000, 600 + 1600),
        ("hf", "int4_awq"): (4000, 300 + 1600), ("trtllm", "fp8_kv"): (4000, 600 + 1600),
        ("trtllm_engine", None): (0, 0), ("trtllm_engine", "fp8"): (2000, 0),
        ("onnx", "int8"): (4000, 0), ("gguf", "q8_0"): (4000, 4000),
    }  # fmt: skip
    for (to, quantize), expected in held.items():
        exporter = find_plugin(EXPORTERS, to, where="export.0.to")
        export = Export(to=to, quantize=quantize)
        assert exporter.needs(export, params=1000, embedding_params=400) == expected, to
    triton = find_plugin(EXPORTERS, "triton", where="export.0.to")
    for backend, expected in (("vllm", (0, 0)), ("onnx", (4000, 0))):
        export = Export(to="triton", backend=backend)
        assert triton.needs(export, params=1000, embedding_params=400) == expected


def test_a_wrong_name_is_told_the_closest() -> None:
    with pytest.raises(ParetronError) as caught:
        find_plugin(EXPORTERS, "onx", where="export.0.to")
    assert "onnx" in caught.value.problems[0].fix


def test_one_of_a_third_party_is_planned_and_refuses(
    third_party: Path, pico: PicoMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    pico()
    for name, code in (("shapes", 0), ("paper", 6)):
        recipe = third_party / f"{name}.yaml"
        recipe.write_text(RECIPE.replace("TO", name))
        with pytest.raises(SystemExit) as ended:
            main(["plan", str(recipe), "--json"])
        assert ended.value.code == code
        planned = json.loads(capsys.readouterr().out)
        if code:
            assert [p["cause"] for p in planned["problems"]] == ["paper cannot hold llama"]
        else:
            (stage,) = [s for s in planned["stages"] if s["name"] == "width.export-shapes"]
            facts = planned["students"]["width"]
            embedding = facts["params"] - facts["non_embedding_params"]
            assert stage["memory_bytes"] == 5 * facts["params"]
            assert stage["disk_bytes"] == facts["weight_bytes"] + 7 * embedding


def test_one_of_a_third_party_exports(third_party: Path, pico: PicoMaker) -> None:
    out = third_party / "out"
    with pytest.raises(SystemExit) as ended:
        main(["export", str(pico()), "--to", "shapes", "--out", str(out), "-q"])
    assert not ended.value.code
    verify(out)
    shapes = json.loads((out / "shapes.json").read_text())
    assert shapes["model.norm.weight"] == [64]
    assert json.loads((out / "parity.json").read_text())["passed"]
