"""Every family through the whole job: two steps of training, exports, the same numbers outside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from paretron.artifacts.models import load_model
from paretron.artifacts.reader import Checkpoint
from paretron.cli.main import _run
from paretron.families import sizes
from pico import MOE_FAMILIES, PICO_FAMILIES
from picorun import RECIPE, write_pico_recipe

TWO_STEPS = 2 * RECIPE["distill"]["global_batch"] * 32


EXPORTED = ("llama", "mistral", "qwen2", "qwen3", "nemotron")
# The others' graphs are compared in tests/exporters; here they are trained and served.
FURTHER = tuple(f for f in PICO_FAMILIES if f not in EXPORTED)


@pytest.mark.parametrize("family", FURTHER)
def test_two_steps_and_the_same_checkpoint(family: str, tmp_path: Path) -> None:
    recipe = write_pico_recipe(
        tmp_path,
        family=family,
        correct=None,
        profile=None,
        students={"small": {"hidden": 48, "ffn": 64, "heads": 2, "layers": 2}},
        distill=RECIPE["distill"] | {"tokens": TWO_STEPS},
        export=[{"to": "hf"}],
    )
    run = tmp_path / "run"
    assert _run(["run", str(recipe), "--out", str(run), "-q", "--offline"]) == 0
    trained = run / "stages" / "small.distill"
    steps = json.loads((trained / "metrics.json").read_text())["train"]
    assert len(steps) == 2
    prompt = torch.arange(3, 35).unsqueeze(0)
    with torch.no_grad():
        logits = load_model(trained)(prompt).logits
        served = load_model(run / "stages" / "small.export-hf")(prompt).logits
    assert torch.equal(logits, served)
    config = json.loads((trained / "config.json").read_text())
    assert config["num_attention_heads"] * config["head_dim"] != config["hidden_size"]
    # What was trained is what transformers itself computes, caps and factors included.
    pruned = load_model(run / "stages" / "small.prune")(prompt).logits
    assert not torch.equal(pruned, logits)


@pytest.mark.parametrize("family", EXPORTED)
def test_two_steps_and_exports(family: str, tmp_path: Path) -> None:
    recipe = write_pico_recipe(
        tmp_path,
        family=family,
        correct=None,
        profile=None,
        students={"narrow": {"hidden": 48, "ffn": 64, "heads": 2}, "short": {"layers": 2}},
        distill=RECIPE["distill"] | {"tokens": TWO_STEPS},
    )
    run = tmp_path / "run"
    assert _run(["run", str(recipe), "--out", str(run), "-q", "--offline"]) == 0
    prompt = torch.arange(3, 35).unsqueeze(0)
    for student in ("narrow", "short"):
        trained = run / "stages" / f"{student}.distill"
        steps = json.loads((trained / "metrics.json").read_text())["train"]
        assert len(steps) == 2
        with torch.no_grad():
            logits = load_model(trained)(prompt).logits
            served = load_model(run / "stages" / f"{student}.export-hf")(prompt).logits
        assert torch.equal(logits, served)
        config = json.loads((trained / "config.json").read_text())
        assert config["num_attention_heads"] * config["head_dim"] != config["hidden_size"]
        parity = json.loads((run / "stages" / f"{student}.export-onnx" / "parity.json").read_text())
        measured = [
            c["measured"]["max_abs"] for c in parity["checks"] if "max_abs" in c["measured"]
        ]
        assert measured
        assert max(measured) < 1e-4


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_mixtures_of_experts_from_score_to_export(family: str, tmp_path: Path) -> None:
    narrow = {"hidden": 48, "moe_ffn": 32, "experts": 3, "heads": 2}
    recipe = write_pico_recipe(
        tmp_path,
        family=family,
        correct=None,
        profile=None,
        students={"narrow": narrow, "short": {"layers": 2}},
        distill=RECIPE["distill"] | {"tokens": TWO_STEPS},
        export=[{"to": "hf"}],
    )
    run = tmp_path / "run"
    assert _run(["run", str(recipe), "--out", str(run), "-q", "--offline"]) == 0
    prompt = torch.arange(3, 35).unsqueeze(0)
    for student in ("narrow", "short"):
        trained = run / "stages" / f"{student}.distill"
        assert len(json.loads((trained / "metrics.json").read_text())["train"]) == 2
        with torch.no_grad():
            logits = load_model(trained)(prompt).logits
            served = load_model(run / "stages" / f"{student}.export-hf")(prompt).logits
        assert torch.equal(logits, served)
    checkpoint = Checkpoint.open(run / "stages" / "narrow.export-hf")
    size = sizes(checkpoint.family, checkpoint.config)
    assert {axis: size[axis] for axis in ("hidden", "moe_ffn", "experts")} == {
        axis: narrow[axis] for axis in ("hidden", "moe_ffn", "experts")
    }


def test_a_rehearsal_has_both_kinds_of_layers_and_fewer_experts(tmp_path: Path) -> None:
    recipe = write_pico_recipe(
        tmp_path,
        family="qwen3_moe",
        correct=None,
        profile=None,
        students={"narrow": {"moe_ffn": 32, "experts": 3}},
        export=[{"to": "hf"}],
    )
    out = tmp_path / "rehearsal"
    assert _run(["check", str(recipe), "--out", str(out), "-q", "--offline"]) == 0
    config = Checkpoint.open(out / "twin-teacher").config
    assert (config["num_hidden_layers"], config["mlp_only_layers"]) == (2, [1])
    assert Checkpoint.open(out / "stages" / "narrow.prune").config["num_experts"] == 3
