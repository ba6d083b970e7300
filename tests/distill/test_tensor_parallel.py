"""Models that are cut over processes against models that are whole: the same numbers."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from makers import PicoMaker
from paretron.distill.parallel import check_devices
from paretron.distill.stage import train
from paretron.errors import Code, ParetronError
from paretron.recipe import Distill
from paretron.workers.world import World, joined_world

Arguments = Callable[..., dict[str, Any]]
SCRIPT = Path(__file__).with_name("cut_ranks.py")


def cut_ranks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cut_ranks", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def same(one: Path, other: Path, *, tolerance: float) -> None:
    """Curves and final weights of two trainings, written under these names."""
    curves = [json.loads(p.with_suffix(".json").read_text()) for p in (one, other)]
    for split, keys in (("train", ("loss", "grad_norm", "lr")), ("validation", ("loss",))):
        assert len(curves[0][split]) == len(curves[1][split]) > 0
        for a, b in zip(curves[0][split], curves[1][split], strict=True):
            close = [math.isclose(a[k], b[k], rel_tol=tolerance, abs_tol=tolerance) for k in keys]
            assert all(close), (other.name, split, a, b)
    found, expected = (load_file(p.with_suffix(".safetensors")) for p in (other, one))
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        difference = (found[name] - weight).abs()
        # Adam divides by gradients next to nothing, whose rounding is then all that there is.
        assert float(difference.mean()) <= tolerance / 10, (other.name, name)
        assert float(difference.max()) <= 10 * tolerance, (other.name, name)


def test_two_processes_with_a_share_of_each_matrix_equal_one(
    pico: PicoMaker, tokens: Path, tmp_path: Path
) -> None:
    """Norms over heads, biases, caps, a tied embedding, states, resuming, bf16, compiled layers."""
    script = cut_ranks()
    for family in script.FAMILIES:
        tied = family == "gemma2"
        small: dict[str, Any] = {"num_hidden_layers": 2, "tie_word_embeddings": tied}
        if family == "nemotron":
            small["mlp_bias"] = True
        pico(family, name=family, seed=1, hidden_size=48, **small)
        pico(family, name=f"{family}-teacher", seed=2, **small)
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    script.main(tmp_path, one)
    subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            str(SCRIPT), str(tmp_path), str(two),
        ],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip
    for family in script.FAMILIES:
        same(one / family, two / family, tolerance=1e-6)
    same(two / script.AGAIN, two / "again", tolerance=0)  # resumed: to the bit
    same(one / script.AGAIN, two / "from-one", tolerance=1e-6)  # resumed over other processes
    same(one / script.AGAIN, two / "compiled", tolerance=1e-6)
    with joined_world() as alone:
        script.goes_on(two, "from-two", tmp_path, one, alone)
    same(two / script.AGAIN, one / "from-two", tolerance=1e-6)


def test_shares_of_the_data_and_of_the_matrices_together(
    arguments: Arguments, tmp_path: Path
) -> None:
    """The whole stage: four processes, two shares of the data, two of each matrix."""
    wanted = {"steps": 3, "validate": True, "family": "qwen3", "lr": 1e-4, "min_lr": 1e-5}
    alone = arguments(**wanted)
    train(**alone)
    steps: list[Mapping[str, Any]] = []

    def hear(kind: str, fields: Mapping[str, object]) -> None:
        if kind == "step":
            steps.append(fields)

    four = arguments(
        **wanted, processes=4, tensor_parallel=2, activation_checkpointing=True, on_event=hear
    )
    four |= {"out": tmp_path / "four", "state": tmp_path / "four-state"}
    train(**four)
    assert [s["step"] for s in steps] == [1, 2, 3]
    for out in (alone["out"], four["out"]):
        (out / "metrics.json").rename(out / "model.json")
    same(alone["out"] / "model", four["out"] / "model", tolerance=1e-6)


@pytest.mark.parametrize(
    ("family", "size", "code", "cause"),
    [
        ("phi3", {}, Code.UNSUPPORTED, "joined"),
        ("olmo2", {}, Code.UNSUPPORTED, "over all heads"),
        ("mixtral", {}, Code.UNSUPPORTED, "experts"),
        ("llama", {"num_key_value_heads": 1}, Code.RECIPE_VALUE, "1 key-value heads (kv_heads)"),
        ("llama", {"intermediate_size": 95}, Code.RECIPE_VALUE, "95 MLP neurons (ffn)"),
        ("llama", {"vocab_size": 321}, Code.RECIPE_VALUE, "321 rows of the vocabulary (vocab)"),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_is_refused_by_its_config(
    pico: PicoMaker, family: str, size: dict[str, int], code: Code, cause: str
) -> None:
    """The stage asks this of every model before it reads a weight."""
    sound = pico("llama", name="sound", num_hidden_layers=2)
    model = pico(family, name="student", num_hidden_layers=2, **size)
    settings = Distill(tokens=1, global_batch=2, processes=2, tensor_parallel=2)
    alone = World(0, 1, torch.device("cpu"))
    check_devices(settings, [sound], alone, apart=False)
    with pytest.raises(ParetronError) as caught:
        check_devices(settings, [sound, model], alone, apart=False)
    (problem, *_) = caught.value.problems
    assert problem.code is code
    assert cause in problem.cause
    assert problem.where == "distill.tensor_parallel"


def test_processes_that_do_not_form_groups_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ParetronError) as caught, joined_world(tensor_parallel=2):
        pass
    assert caught.value.problems[0].code is Code.USAGE
