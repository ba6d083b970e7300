"""Every family through the whole job: two steps of training, exports, the same numbers outside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from paretron.artifacts.models import load_model
from paretron.cli.main import _run
from pico import PICO_FAMILIES
from picorun import RECIPE, write_pico_recipe

TWO_STEPS = 2 * RECIPE["distill"]["global_batch"] * 32


@pytest.mark.parametrize("family", PICO_FAMILIES)
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
