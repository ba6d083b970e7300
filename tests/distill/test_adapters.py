"""Corrections that train norms or adapters alone: what moves, what stays, what is published."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from paretron.artifacts.manifest import verify
from paretron.artifacts.models import load_model
from paretron.distill import adapters
from paretron.distill.objective import Objective
from paretron.distill.optimizer import adamw
from paretron.distill.stage import train
from paretron.distill.state import training_tensors
from paretron.errors import Code, ParetronError
from paretron.families import expected_tensors, family_of
from paretron.families.parts import layer_linears, norm_parameters
from paretron.recipe import Correct
from paretron.recipe.training import Loss
from pico import MOE_FAMILIES, PICO_FAMILIES, pico_model
from trainingprocess import messages, training

Arguments = Callable[..., dict[str, Any]]
LORA = {"what": "lora", "lora": {"rank": 4, "alpha": 8}}


def correction(arguments: Arguments, *, what: dict[str, Any], **given: Any) -> dict[str, Any]:
    """The arguments of a correction; those of a distillation without what is its own."""
    plain = arguments(distil=False, **given)
    stated = plain["settings"].model_dump(include=set(Correct.model_fields))
    return plain | {"settings": Correct.model_validate(stated | what)}


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(load_model(folder).named_parameters())


def learned(out: Path) -> bool:
    """Whether the loss on the same text is lower after the training than before it."""
    measured = json.loads((out / "metrics.json").read_text())["validation"]
    return bool(measured[-1]["loss"] < measured[0]["loss"])


@pytest.mark.parametrize("family", [*PICO_FAMILIES, *MOE_FAMILIES])
def test_the_table_names_the_norms_and_the_linears(family: str) -> None:
    model = pico_model(family)
    config = model.config.to_dict()
    table = family_of(config)
    named = dict(model.named_parameters())
    norms = norm_parameters(table, config)
    assert {name: tuple(named[name].shape) for name in norms} == norms
    ours = {f"{n}.{p}" for n, m in model.named_modules() if "Norm" in type(m).__name__
            for p, _ in m.named_parameters()}  # fmt: skip
    assert set(norms) == ours
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n}
    if family in MOE_FAMILIES:
        linears = {name for name in linears if "self_attn" in name}
    found = layer_linears(table, config)
    assert set(found) == linears
    assert all(tuple(named[f"{name}.weight"].shape) == shape for name, shape in found.items())
    assert {f"{name}.weight" for name in found} <= expected_tensors(table, config).keys()


@pytest.mark.parametrize("family", ["llama", "nemotron"])
def test_only_norms_move(arguments: Arguments, family: str) -> None:
    given = correction(arguments, what={"what": "norms"}, family=family, steps=3, validate=True)
    before = weights(given["student"])
    train(**given)
    after = weights(given["out"])
    config = load_model(given["student"]).config.to_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(norm_parameters(family_of(config), config))
    assert learned(given["out"])


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3_moe"])
def test_adapters_are_merged_into_the_matrices_of_layers(arguments: Arguments, family: str) -> None:
    given = correction(arguments, what=LORA, family=family, steps=3, validate=True)
    before = weights(given["student"])
    train(**given)
    verify(given["out"])
    after = weights(given["out"])
    config = load_model(given["student"]).config.to_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {f"{n}.weight" for n in layer_linears(family_of(config), config)}
    for name in moved:
        assert int(torch.linalg.matrix_rank((after[name] - before[name]).double(), rtol=1e-3)) <= 4
    assert learned(given["out"])


def test_optimiser_and_checkpoints_hold_what_trains_alone() -> None:
    for what, expected in (("norms", 5 * 64), ("lora", None)):
        model = pico_model(num_hidden_layers=2)
        settings = Correct.model_validate({"tokens": 1, "what": what} | ({} if expected else LORA))
        objective = Objective(model)
        adapters.choose_trained(model, settings, seed=0)
        if expected is None:
            shapes = layer_linears(family_of(model.config.to_dict()), model.config.to_dict())
            expected = 4 * sum(map(sum, shapes.values()))
        optimizer = adamw(objective, settings)
        held = [p for group in optimizer.param_groups for p in group["params"]]
        assert sum(p.numel() for p in held) == expected
        tensors = training_tensors(objective, optimizer, step=0)
        assert sum(t.numel() for t in tensors.values()) == 3 * expected


def test_a_merge_that_says_something_else_is_not_published(
    arguments: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = adapters.merged_parameters

    def forgetful(*given: Any) -> Any:
        for name, weight in merged(*given):
            yield name, weight * (1.05 if name.endswith("layers.1.mlp.up_proj.weight") else 1)

    monkeypatch.setattr("paretron.distill.publishing.merged_parameters", forgetful)
    given = correction(arguments, what=LORA, steps=2)
    with pytest.raises(ParetronError) as caught:
        train(**given)
    assert caught.value.problems[0].code is Code.GATE_PARITY
    assert caught.value.exit_code == 5
    assert not given["out"].exists()


def test_a_bf16_checkpoint_stays_one(arguments: Arguments, pico: Callable[..., Path]) -> None:
    pico("llama", name="student", hidden_size=48, num_hidden_layers=2, dtype="bfloat16")
    given = correction(arguments, what=LORA, steps=2)
    train(**given)
    assert json.loads((given["out"] / "config.json").read_text())["dtype"] == "bfloat16"


def test_without_the_library_adapters_are_refused(
    arguments: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ParetronError) as caught:
        train(**correction(arguments, what=LORA, steps=2))
    assert caught.value.exit_code == 6
    assert "paretron[lora]" in caught.value.problems[0].fix


def test_a_section_that_nothing_reads_is_refused() -> None:
    with pytest.raises(ValidationError, match="lora goes with what: lora"):
        Correct.model_validate({"tokens": 1, "what": "norms", "lora": {"rank": 2}})


def test_retraining_on_the_labels_asks_no_teacher(arguments: Arguments) -> None:
    given = arguments(steps=3, loss={"logits": "none", "labels": 1.0})
    train(**given)
    metrics = json.loads((given["out"] / "metrics.json").read_text())
    assert metrics["objective"] == "cross_entropy"
    plain = arguments(steps=3, distil=False) | {
        "out": given["out"].with_name("plain"), "state": given["state"].with_name("plain-state")
    }  # fmt: skip
    train(**plain)
    other = json.loads((plain["out"] / "metrics.json").read_text())
    for a, b in zip(metrics["train"], other["train"], strict=True):
        assert math.isclose(a["loss"], b["loss"], rel_tol=1e-9)


@pytest.mark.parametrize(
    "stated", [{}, {"labels": 0.5}, {"labels": 1.0, "temperature": 2.0},
               {"labels": 1.0, "states": {"embedding": True}}],
)  # fmt: skip
def test_a_loss_of_labels_alone_is_stated_as_one(stated: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="labels alone"):
        Loss.model_validate({"logits": "none"} | stated)


def test_adapters_over_two_processes_survive_a_kill(arguments: Arguments) -> None:
    """As one process learns them, and to the same bits after one of the two was killed."""
    given = correction(arguments, what=LORA, steps=8, processes=2, micro_batch=2,
                       checkpoint_every=3)  # fmt: skip

    def elsewhere(name: str, **changed: Any) -> dict[str, Any]:
        folders = {k: given[k].with_name(f"{name}-{k}") for k in ("out", "state")}
        return given | folders | changed

    train(**given)
    alone = elsewhere("one", settings=given["settings"].model_copy(update={"processes": 1}))
    train(**alone)
    one, two = (weights(place["out"]) for place in (alone, given))
    assert all(float((one[name] - two[name]).abs().max()) < 2e-5 for name in one)

    def kill_one(kind: str, fields: Mapping[str, object]) -> None:
        if kind == "step" and fields["step"] == 5:
            [p.kill() for p in psutil.Process().children(recursive=True)
             if p.environ().get("RANK") == "1"]  # fmt: skip

    with pytest.raises(ParetronError) as caught:
        train(**elsewhere("killed", on_event=kill_one))
    assert caught.value.problems[0].code is Code.DEVICE
    verify(elsewhere("killed")["state"] / "step-000003")
    train(**elsewhere("killed"))
    assert verify(elsewhere("killed")["out"])["files"] == verify(given["out"])["files"]


@pytest.mark.parametrize("what", ["norms", "lora"])
def test_twenty_steps_of_some_weights_are_ten_and_a_kill_and_ten(
    arguments: Arguments, tmp_path: Path, what: str
) -> None:
    given = correction(arguments, what={"what": what}, steps=20, checkpoint_every=10)
    train(**given)
    killed = given | {k: given[k].with_name(f"killed-{k}") for k in ("out", "state")}
    with training(killed, tmp_path) as (process, events):
        for message in messages(process, events):
            if message.get("event") == "checkpoint" and message["fields"]["saved_step"] == 10:
                process.kill()
                break
    verify(killed["state"] / "step-000010")
    train(**killed)
    assert verify(killed["out"])["files"] == verify(given["out"])["files"]
