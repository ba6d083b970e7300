"""An ONNX folder whose graph or settings name files elsewhere is not handed to the runtime (E6)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from paretron.errors import Code, ParetronError
from paretron_profiling.engines.engine import EngineSettings, Limits
from paretron_profiling.engines.ortgenai import ENGINE, check_files

onnx = pytest.importorskip("onnx")

Folder = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Write a model folder with a weight, and one in a branch of a condition, at given places."""

    def write(*, location: str = "w.data", inner: str = "w.data", name: str = "model.onnx") -> Path:
        where = tmp_path / "model"
        where.mkdir()
        (where / "w.data").write_bytes(bytes(24))
        branch = onnx.helper.make_graph([], "then", [], [], initializer=[_weight("b", inner)])
        node = onnx.helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
        graph = onnx.helper.make_graph([node], "g", [], [], initializer=[_weight("w", location)])
        (where / "model.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
        settings = {"model": {"decoder": {"filename": name}}}
        (where / "genai_config.json").write_text(json.dumps(settings))
        return where

    return write


def _weight(name: str, location: str) -> object:
    tensor = onnx.TensorProto(name=name, dims=[6], data_type=onnx.TensorProto.FLOAT)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


def test_plain_files_beside_the_graph_are_right(folder: Folder) -> None:
    check_files(folder())


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "sub/w.data", "..\\secret"])
@pytest.mark.parametrize("part", ["location", "inner", "name"])
def test_e6_a_path_is_refused(part: str, location: str, folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(24))
    model = folder(**{part: location})
    with (
        pytest.raises(ParetronError) as caught,
        ENGINE.open(model, settings=EngineSettings(name="ortgenai"), limits=Limits(1, 64, 1)),
    ):
        pass
    assert caught.value.problems[0].code is Code.INPUT_UNSAFE_PATH


@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize("file", ["w.data", "model.onnx", "genai_config.json"])
def test_e6_a_link_is_refused(
    link: Callable[[Path, Path], None], file: str, folder: Folder, tmp_path: Path
) -> None:
    model = folder()
    (model / file).rename(tmp_path / "secret")
    link(tmp_path / "secret", model / file)
    with pytest.raises(ParetronError) as caught:
        check_files(model)
    assert caught.value.problems[0].code is Code.INPUT_UNSAFE_PATH
    assert f"{file} is a link" in caught.value.problems[0].cause
