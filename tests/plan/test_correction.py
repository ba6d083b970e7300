"""What planning says of a correction: the weights that train, what they cost, what is missing."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import pytest

from paretron.errors import Code
from paretron.families import expected_tensors, family_of
from paretron.plan import correction
from paretron.plan.correction import corrected_tokens, trained_weights
from paretron.plan.plan import Plan, make_plan
from paretron.recipe import Correct, load_recipe
from pico import pico_model
from picorun import RECIPE, write_pico_recipe


def test_the_weights_that_train_are_counted() -> None:
    stated: dict[str, dict[str, Any]] = {
        "all": {},
        "norms": {"what": "norms"},
        "lora": {"what": "lora", "lora": {"rank": 2}},
    }
    config = pico_model("nemotron", num_hidden_layers=2).config.to_dict()
    family = family_of(config)
    everything = sum(map(prod, expected_tensors(family, config).values()))
    counts = {
        what: trained_weights(Correct.model_validate({"tokens": 1} | section), family, config)
        for what, section in stated.items()
    }
    # Two norms in each of two layers and the last one, each with a bias; q, k, v, o, up, down.
    matrices = 2 * ((64 + 128) + 2 * (64 + 64) + (128 + 64) + 2 * (64 + 96))
    assert counts == {"all": everything, "norms": 5 * 2 * 64, "lora": 2 * matrices}
    assert trained_weights(None, family, config) == 0


def test_less_trains_for_less_memory_disk_and_work(tmp_path: Path) -> None:
    recipe = write_pico_recipe(tmp_path, export=[{"to": "hf"}], profile=None)
    found = {}
    for what in ("all", "norms", "lora"):
        plan = make_plan(
            load_recipe(recipe, overrides=[f"correct.what={what}"]), out=tmp_path, offline=True
        )
        assert not plan.problems
        found[what] = plan.estimates["correct"]
    assert found["norms"].flops == found["lora"].flops == found["all"].flops * 2 // 3
    for what in ("norms", "lora"):
        assert found[what].disk_bytes < found["all"].disk_bytes
    assert found["norms"].memory_bytes < found["all"].memory_bytes // 3


def test_adapters_without_their_library_are_a_problem_of_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_pico_recipe(tmp_path, export=[{"to": "hf"}], profile=None)
    monkeypatch.setattr(correction, "find_spec", lambda name: None)
    loaded = load_recipe(recipe, overrides=["correct.what=lora"])
    (problem,) = make_plan(loaded, out=tmp_path, offline=True).problems
    assert (problem.code, problem.code.exit) == (Code.OPTIONAL_MISSING, 6)
    assert "paretron[lora]" in problem.fix
    assert not make_plan(load_recipe(recipe), out=tmp_path, offline=True).problems


def test_retraining_pays_for_no_teacher(tmp_path: Path) -> None:
    distill = RECIPE["distill"] | {"loss": {"logits": "none", "labels": 1.0}}
    found = []
    for section in (RECIPE["distill"], distill):
        recipe = write_pico_recipe(
            tmp_path, export=[{"to": "hf"}], profile=None, distill=section
        )  # fmt: skip
        plan = make_plan(load_recipe(recipe), out=tmp_path, offline=True)
        found.append(plan.estimates["width.distill"])
    distilled, retrained = found
    seq_len = RECIPE["data"]["train"]["seq_len"]
    asked = plan.teacher.forward_flops(tokens=RECIPE["distill"]["tokens"], seq_len=seq_len)
    assert distilled.flops - retrained.flops == asked
    assert distilled.memory_bytes - retrained.memory_bytes == plan.teacher.weight_bytes


def along(folder: Path, *overrides: str) -> Plan:
    """The plan of a recipe whose teacher is corrected while it teaches."""
    correct = {"mode": "parallel", "tokens": 512}
    recipe = write_pico_recipe(folder, export=[{"to": "hf"}], profile=None, correct=correct)
    return make_plan(load_recipe(recipe, overrides=overrides), out=folder, offline=True)


def test_a_parallel_correction_is_part_of_every_distillation(tmp_path: Path) -> None:
    recipe = write_pico_recipe(tmp_path, export=[{"to": "hf"}], profile=None, correct=None)
    plain = make_plan(load_recipe(recipe), out=tmp_path, offline=True)
    plan = along(tmp_path)
    assert not plan.problems
    stages = {stage.name: stage for stage in plan.stages}
    assert "correct" not in stages
    assert stages["score"].inputs["model"] == "teacher"
    assert stages["width.prune"].inputs["model"] == "teacher"
    assert stages["width.distill"].settings["correct"]["tokens"] == 512
    assert stages["width.evaluate-teacher"].inputs["model"] == "width.distill"
    assert stages["teacher.evaluate-final"].inputs["model"] == "teacher"
    own, along_with = (p.estimates["width.distill"] for p in (plain, plan))
    teacher = plan.teacher
    seq_len = RECIPE["data"]["train"]["seq_len"]
    # One forward pass serves both, so the backward pass is what is more.
    assert along_with.flops - own.flops == 2 * teacher.forward_flops(tokens=512, seq_len=seq_len)
    # Weights, gradients and moments in fp32, in place of weights alone.
    assert along_with.memory_bytes - own.memory_bytes == 16 * teacher.params - teacher.weight_bytes
    # Two checkpoints, and the copy that is published.
    assert along_with.disk_bytes - own.disk_bytes == 2 * 12 * teacher.params + teacher.weight_bytes


def test_a_parallel_correction_of_less_costs_less(tmp_path: Path) -> None:
    every, norms = (
        along(tmp_path, f"correct.what={what}").estimates["width.distill"]
        for what in ("all", "norms")
    )
    assert norms.flops < every.flops
    assert norms.memory_bytes < every.memory_bytes
    assert norms.disk_bytes < every.disk_bytes


def test_a_parallel_correction_reads_windows_of_the_phases(tmp_path: Path) -> None:
    phases = "distill={phases: [{seq_len: 32, tokens: 256}, {seq_len: 64, tokens: 512}],"
    phases += " global_batch: 4, micro_batch: 2, dtype: float32}"
    plan = along(tmp_path, phases)
    assert corrected_tokens(plan.recipe) == [(256, 32), (256, 64)]
    (problem,) = along(tmp_path, "correct.tokens=127").problems
    assert (problem.code, problem.where) == (Code.RECIPE_VALUE, "correct.tokens")
