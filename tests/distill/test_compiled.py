"""Compiled layers: the same numbers and names as layers that are not, one program for all."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from paretron.distill.stage import train
from paretron.errors import Code, ParetronError
from pico import pico_model

Arguments = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def _nothing_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch.compiler.reset()
    counters.clear()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers become programs of their own, which nobody translates for the processor: seconds."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


def losses(out: Path) -> list[float]:
    curves = json.loads((out / "metrics.json").read_text())
    return [point["loss"] for split in ("train", "validation") for point in curves[split]]


def elsewhere(given: dict[str, Any], name: str) -> dict[str, Any]:
    return given | {
        "out": given["out"].with_name(name),
        "state": given["state"].with_name(f"{name}-state"),
    }


def difference(one: Path, other: Path) -> float:
    """The largest of losses and weights, which have the same names."""
    a, b = losses(one), losses(other)
    assert len(a) == len(b)
    own, others = (load_file(out / "model.safetensors") for out in (one, other))
    assert own.keys() == others.keys()
    weights = (float((own[n] - others[n]).abs().max()) for n in own)
    return max(*(abs(x - y) for x, y in zip(a, b, strict=True)), *weights)


def test_programs_for_the_processor_train_as_layers_do(arguments: Arguments) -> None:
    slow = {"steps": 3, "distil": False, "lr": 1e-4, "min_lr": 1e-5}
    train(**arguments(**slow))
    compiled = elsewhere(arguments(**slow, compile=True), "compiled")
    train(**compiled)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert difference(arguments()["out"], compiled["out"]) < 1e-5


@pytest.mark.parametrize("family", ["gemma2", "mistral"])
def test_all_layers_share_one_program(arguments: Arguments, traced: None, family: str) -> None:
    """One for the student and one for the teacher; gemma2's windows come to its layers as masks."""
    train(**arguments(steps=2, family=family, validate=False))
    compiled = elsewhere(
        arguments(steps=2, compile=True, activation_checkpointing=True), "compiled"
    )
    train(**compiled)
    assert counters["stats"]["unique_graphs"] == 2
    assert difference(arguments()["out"], compiled["out"]) < 1e-5


def test_a_compiled_training_goes_on_where_another_was(arguments: Arguments, traced: None) -> None:
    """Stopped eagerly after two steps; its checkpoint is that of a compiled training, too."""
    whole = arguments(steps=4, distil=False)
    train(**whole)

    class Stopped(Exception):
        pass

    def stop(kind: str, fields: Mapping[str, object]) -> None:
        if kind == "checkpoint" and fields["saved_step"] == 2:
            raise Stopped

    given = {"steps": 4, "distil": False, "checkpoint_every": 2}
    parts = elsewhere(arguments(**given, on_event=stop), "parts")
    with pytest.raises(Stopped):
        train(**parts)
    compiled = arguments(**given, compile=True)["settings"]
    heard: list[object] = []
    train(
        **parts
        | {"settings": compiled, "on_event": lambda kind, fields: heard.append(fields.get("step"))}
    )
    assert [step for step in heard if step] == [3, 4]
    assert difference(whole["out"], parts["out"]) < 1e-5


def test_without_a_compiler_nothing_is_read(
    arguments: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("paretron.distill.stage._prepare", None)
    with pytest.raises(ParetronError) as caught:
        train(**arguments(compile=True))
    (problem,) = caught.value.problems
    assert problem.code is Code.OPTIONAL_MISSING
    assert problem.where == "distill.compile"


def test_a_compiler_that_fails_is_told(
    arguments: Arguments, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "c++"
    broken.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exec g++ "$@"\necho "error: no header" >&2; exit 1\n'
    )
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, str(broken)))
    given = arguments(compile=True, distil=False)
    with pytest.raises(ParetronError, match="error: no header") as caught:
        train(**given)
    (problem,) = caught.value.problems
    assert (problem.code, problem.where) == (Code.ENGINE, "distill.compile")
    assert not given["out"].exists()


def test_what_is_compiled_has_the_names_that_it_had() -> None:
    from paretron.distill.parallel import checkpoint_layers, compile_layers

    model = pico_model("llama", num_hidden_layers=2)
    before = list(model.state_dict())
    checkpoint_layers(model)
    compile_layers(model)
    assert list(model.state_dict()) == before
