"""A graph that names files it should not, or weights that are not there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from paretron.errors import Code, ParetronError
from paretron_exporters.onnx_file import read_graph

onnx = pytest.importorskip("onnx")


@pytest.fixture
def graph(tmp_path: Path) -> Callable[..., Path]:
    """Write a graph with one 2x3 weight at the given place, in a folder of its own."""

    def write(**place: str) -> Path:
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        (folder / "model.onnx.data").write_bytes(torch.arange(6.0).numpy().tobytes())
        tensor = onnx.TensorProto(name="w", dims=[2, 3], data_type=onnx.TensorProto.FLOAT)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in ({"location": "model.onnx.data"} | place).items():
            tensor.external_data.add(key=key, value=value)
        body = onnx.helper.make_graph([], "g", [], [], initializer=[tensor])
        model = onnx.helper.make_model(body, opset_imports=[onnx.helper.make_opsetid("", 22)])
        (folder / "model.onnx").write_bytes(model.SerializeToString())
        return folder / "model.onnx"

    return write


def test_a_weight_beside_the_graph_is_read(graph: Callable[..., Path]) -> None:
    found = read_graph(graph(offset="0", length="24"))
    assert found.opset == 22
    assert torch.equal(found.initialisers["w"].read(), torch.arange(6.0).view(2, 3))


@pytest.mark.parametrize(
    "location",
    ["../secret", "/etc/hostname", "a/../../secret", "..\\secret", "sub/x", "a\0b", ".x"],
)
def test_a_path_is_refused(location: str, graph: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(24))
    with pytest.raises(ParetronError) as caught:
        read_graph(graph(location=location))
    assert caught.value.problems[0].code is Code.INPUT_UNSAFE_PATH


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_link_is_refused(link: Any, graph: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(24))
    file = graph(location="weights.bin")
    link(tmp_path / "secret", file.parent / "weights.bin")
    with pytest.raises(ParetronError) as caught:
        read_graph(file)
    assert caught.value.problems[0].code is Code.INPUT_UNSAFE_PATH
    assert "weights.bin is a link" in caught.value.problems[0].cause


@pytest.mark.parametrize(
    ("place", "code"),
    [
        ({"location": "absent.bin"}, Code.INPUT_MISSING),
        ({"offset": "4"}, Code.INPUT_TRUNCATED),
        ({"offset": "-4"}, Code.INPUT_EXTERNAL),
        ({"length": "20"}, Code.INPUT_EXTERNAL),
        ({"offset": "x"}, Code.INPUT_EXTERNAL),
    ],
)
def test_a_place_that_does_not_hold_it(
    place: dict[str, str], code: Code, graph: Callable[..., Path]
) -> None:
    with pytest.raises(ParetronError) as caught:
        read_graph(graph(**place))
    assert caught.value.problems[0].code is code
    assert "w" in caught.value.problems[0].where
