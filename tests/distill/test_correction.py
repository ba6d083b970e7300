"""A teacher that is corrected while its student learns: what both become, and what survives."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from makers import PicoMaker
from paretron.artifacts.manifest import verify
from paretron.artifacts.models import load_model
from paretron.data.store import TokenStore
from paretron.distill.batches import Windows
from paretron.distill.correction import CorrectedTeacher, Correction
from paretron.distill.objective import Objective
from paretron.distill.preflight import check_before_training
from paretron.distill.schedule import Leg, Place, Schedule, learning_rate
from paretron.distill.stage import train
from paretron.errors import Code, ParetronError
from paretron.families import family_of
from paretron.families.parts import layer_linears, norm_parameters
from paretron.recipe import Correct
from trainingprocess import content, elsewhere, messages, training

Arguments = Callable[..., dict[str, Any]]
STEP = 8 * 32  # tokens, as `arguments` batches them
RATES = {"lr": 2e-3, "min_lr": 2e-4, "warmup_steps": 1}
LORA = {"what": "lora", "lora": {"rank": 4, "alpha": 8}}


def along(given: dict[str, Any], **stated: Any) -> dict[str, Any]:
    """The same distillation with a teacher that is corrected meanwhile, in all steps."""
    shared = given["settings"].model_dump(include=set(Correct.OF_DISTILL))
    wanted = {"mode": "parallel", "tokens": given["settings"].tokens} | RATES | stated
    return given | {"correct": Correct.model_validate(shared | wanted)}


def serial(given: dict[str, Any], *, steps: int) -> dict[str, Any]:
    """The same teacher corrected alone, on as many steps."""
    stated = given["settings"].model_dump(include=set(Correct.model_fields))
    section = Correct.model_validate(stated | RATES | {"tokens": steps * STEP})
    alone = {
        "student": given["teacher"], "teacher": None, "settings": section, "correct": None
    }  # fmt: skip
    return elsewhere(given, "serial") | alone


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(load_model(folder).named_parameters())


def same(one: Path, two: Path) -> bool:
    others = weights(two)
    return all(torch.equal(weight, others[name]) for name, weight in weights(one).items())


def curve(out: Path) -> list[dict[str, float]]:
    points: list[dict[str, float]] = json.loads((out / "metrics.json").read_text())["train"]
    return points


@pytest.mark.parametrize("steps", [6, 4], ids=["to the end", "and then no more"])
def test_it_becomes_what_it_becomes_alone(arguments: Arguments, steps: int) -> None:
    """Windows, batches and arithmetic are the same, so it is to the bit, and so are its losses."""
    given = along(arguments(steps=6), tokens=steps * STEP + 5)  # no whole step more
    before = content_of(given["teacher"])
    train(**given)
    train(**serial(given, steps=steps))
    assert same(given["out"] / "teacher", given["out"].with_name("serial"))
    found = [p["teacher_loss"] for p in curve(given["out"]) if "teacher_loss" in p]
    assert found == [p["loss"] for p in curve(given["out"].with_name("serial"))]
    assert len(found) == steps
    assert content_of(given["teacher"]) == before  # on disk the given one stays as it is
    assert verify(given["out"] / "teacher")["kind"] == "correct"


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_student_learns_from_a_teacher_that_moves(arguments: Arguments) -> None:
    """What it imitates first was said before anything was corrected."""
    given = along(arguments(steps=3))
    train(**given)
    plain = elsewhere(arguments(steps=3), "plain")
    train(**plain)
    moved, still = ([p["loss"] for p in curve(g["out"])] for g in (given, plain))
    assert moved[0] == still[0]
    assert moved[1] != still[1]
    assert not same(given["out"], plain["out"])
    assert not (plain["out"] / "teacher").exists()
    assert all("teacher_loss" not in p for p in curve(plain["out"]))


def test_a_later_step_learns_from_the_teacher_of_the_step_before(arguments: Arguments) -> None:
    """The second loss, by a student and a teacher that are each one step old."""
    losses = []
    for tokens in (STEP, 2 * STEP):
        given = elsewhere(along(arguments(steps=2), tokens=tokens), f"of-{tokens}")
        train(**given)
        losses.append(curve(given["out"])[1]["loss"])
    # Warm-up takes both through the same first step; what the second corrects comes too late.
    assert losses[0] == losses[1]


@pytest.mark.parametrize("what", ["norms", "lora"])
def test_only_what_is_asked_for_moves(arguments: Arguments, what: str) -> None:
    given = along(arguments(steps=3), **(LORA if what == "lora" else {"what": what}))
    train(**given)
    before, after = weights(given["teacher"]), weights(given["out"] / "teacher")
    config = load_model(given["teacher"]).config.to_dict()
    expected = set(norm_parameters(family_of(config), config))
    if what == "lora":
        expected = {f"{n}.weight" for n in layer_linears(family_of(config), config)}
    assert {name for name in before if not torch.equal(before[name], after[name])} == expected


def test_weights_come_out_in_the_dtype_they_came_in(arguments: Arguments, pico: PicoMaker) -> None:
    pico("llama", name="teacher", seed=2, num_hidden_layers=2, dtype="bfloat16")
    given = along(arguments(steps=2, dtype="bfloat16"))
    train(**given)
    found = json.loads((given["out"] / "teacher" / "config.json").read_text())
    assert found["dtype"] == "bfloat16"
    first, second = curve(given["out"])
    assert second["teacher_loss"] < first["teacher_loss"]


def test_states_are_imitated_of_the_teacher_that_moves(arguments: Arguments) -> None:
    wanted = {"loss": {"states": {"embedding": True, "output": [[1, 0]]}}}
    given = along(arguments(steps=3, **wanted))
    train(**given)
    plain = elsewhere(arguments(steps=3, **wanted), "plain")
    train(**plain)
    moved, still = ([p["states"] for p in curve(g["out"])] for g in (given, plain))
    assert moved[0] == still[0]
    assert moved[2] != still[2]


def test_how_work_is_divided_does_not_matter(arguments: Arguments) -> None:
    given = along(arguments(steps=3))
    train(**given)
    saving = elsewhere(along(arguments(steps=3, activation_checkpointing=True)), "saving")
    train(**saving)
    assert same(saving["out"], given["out"])
    assert same(saving["out"] / "teacher", given["out"] / "teacher")
    other = elsewhere(along(arguments(steps=3, micro_batch=2)), "other")
    train(**other)
    for a, b in zip(curve(given["out"]), curve(other["out"]), strict=True):
        assert all(math.isclose(a[k], b[k], rel_tol=1e-6) for k in a)


def test_every_step_tells_of_the_teacher_while_it_learns(arguments: Arguments) -> None:
    steps: list[Mapping[str, Any]] = []

    def hear(kind: str, fields: Mapping[str, object]) -> None:
        if kind == "step":
            steps.append(fields)

    train(**along(arguments(steps=3, on_event=hear), tokens=2 * STEP))
    assert ["teacher_loss" in s for s in steps] == [True, True, False]
    assert all(s["teacher_grad_norm"] > 0 for s in steps[:2])


def test_a_teacher_that_is_not_finite_stops_both(
    arguments: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = Correction.measured

    def poisoned(self: Correction) -> dict[str, float]:
        return measured(self) | {"teacher_loss": math.nan}

    monkeypatch.setattr(Correction, "measured", poisoned)
    given = along(arguments(steps=2))
    with pytest.raises(ParetronError) as caught:
        train(**given)
    (problem,) = caught.value.problems
    assert problem.code is Code.GATE_NONFINITE
    assert "teacher_loss nan" in problem.cause
    assert json.loads(Path(problem.where).read_text())["teacher_loss"] == "nan"
    assert not list(given["state"].glob("step-*"))


def test_a_weight_of_the_teacher_that_no_gradient_reaches_is_found(
    arguments: Arguments, tokens: Path
) -> None:
    given = arguments()
    model, batch = (
        load_model(given["teacher"]),
        Windows(TokenStore.open(tokens), 32, 320).batch([0]),
    )
    teacher, objective = CorrectedTeacher(model), Objective(load_model(given["student"]))
    check_before_training(objective, teacher, batch, untrained=True)
    assert all(p.grad is None for p in teacher.parameters())
    norm = model.model.layers[1].post_attention_layernorm
    forward = norm.forward
    norm.forward = lambda x: forward(x).detach()
    with pytest.raises(ParetronError) as caught:
        check_before_training(objective, teacher, batch, untrained=True)
    assert caught.value.problems[0].where == "model.layers.1.post_attention_layernorm.weight"


def test_a_correction_of_no_whole_step_is_refused(arguments: Arguments) -> None:
    with pytest.raises(ParetronError) as caught:
        train(**along(arguments(steps=2), tokens=STEP - 1))
    assert caught.value.problems[0].code is Code.RECIPE_VALUE
    assert caught.value.problems[0].where == "correct.tokens"


def test_without_a_teacher_to_train_it_is_refused(arguments: Arguments) -> None:
    with pytest.raises(ParetronError) as caught:
        train(**along(arguments(steps=2)) | {"teacher": None})
    assert caught.value.problems[0].where == "correct.mode"


def test_phases_are_corrected_on_one_curve() -> None:
    """Two of four and three steps, of which the first six correct."""
    leg = Leg(seq_len=4, tokens=32, global_batch=2, micro_batch=1, lr=1.0, min_lr=0.0)
    legs = (leg, replace(leg, seq_len=8, tokens=48, lr=0.5))
    schedule = Schedule(legs, warmup_steps=7).first(72, lr=0.1, min_lr=0.01, warmup_steps=2)
    places = [Place(0, n) for n in range(0, 32, 8)] + [Place(1, n) for n in (0, 16)]
    for k, place in enumerate(places):
        wanted = learning_rate(k, steps=6, peak=0.1, floor=0.01, warmup_steps=2)
        assert math.isclose(schedule.learning_rate(place), wanted)
    assert schedule.legs[1].steps(after=32) == 0


def test_twenty_steps_are_ten_and_a_kill_and_ten(arguments: Arguments, tmp_path: Path) -> None:
    """The teacher learns two steps more when it goes on, and then none."""
    given = along(arguments(steps=20, checkpoint_every=10, micro_batch=2), tokens=12 * STEP)
    train(**given)
    killed = elsewhere(given, "killed")
    with training(killed, tmp_path) as (process, events):
        for message in messages(process, events):
            if message.get("event") == "checkpoint":
                process.kill()
                break
    assert not killed["out"].exists()
    verify(killed["state"] / "step-000010")
    train(**killed)
    assert content(killed["out"]) == content(given["out"])
    assert {"model.safetensors", "teacher/model.safetensors"} <= content(given["out"]).keys()


def test_a_checkpoint_of_another_correction_is_refused(arguments: Arguments) -> None:
    given = along(arguments(steps=4, checkpoint_every=2))
    train(**given)
    for other in (along(given, lr=1e-3), given | {"correct": None}):
        with pytest.raises(ParetronError) as caught:
            train(**other | {"out": given["out"].with_name("other")})
        assert {p.code for p in caught.value.problems} == {Code.RUN_MISMATCH}
        assert any("training.correct" in p.cause for p in caught.value.problems)
