"""An exporter of someone else's: found by its entry point, like ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from paretron.errors import Code, ParetronError
from paretron.plugins import EXPORTERS, find_plugin, plugin_names
from paretron.recipe import Export

MODULE = """
from paretron.errors import Code, Problem

class Exporter:
    name = "paper"

    def problems(self, config, *, export):
        return [Problem(Code.UNSUPPORTED, f"paper cannot hold {config['model_type']}")]

EXPORTER = Exporter()
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
    )
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


def test_a_wrong_name_is_told_the_closest() -> None:
    with pytest.raises(ParetronError) as caught:
        find_plugin(EXPORTERS, "onx", where="export.0.to")
    assert "onnx" in caught.value.problems[0].fix
