"""Group D: what a training refuses, survives or proves; in this process, on pico models."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from losscases import LOSSES
from makers import PicoMaker
from paretron.artifacts.manifest import Provenance, verify, write_manifest
from paretron.artifacts.models import load_model
from paretron.distill.fused import DeferredLogits, fused_divergence
from paretron.distill.losses import IGNORE
from paretron.distill.objective import Teacher
from paretron.distill.stage import train
from paretron.errors import Code, ParetronError
from paretron.families import LogitRule
from paretron.run.tracking import Tracked

Arguments = Callable[..., dict[str, Any]]
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Stop(Exception):
    """Ends a training from its events."""


def cut_after(given: dict[str, Any], step: int) -> None:
    """Begin a training that saves every step, and end it after this one."""

    def hear(kind: str, fields: Mapping[str, object]) -> None:
        if kind == "step" and fields["step"] == step:
            raise Stop

    frequent = given["settings"].model_copy(update={"checkpoint_every": 1})
    with pytest.raises(Stop):
        train(**given | {"settings": frequent, "on_event": hear})


def refused(given: dict[str, Any], code: Code) -> str:
    """What a training that must be refused says, once."""
    with pytest.raises(ParetronError) as caught:
        train(**given)
    assert {p.code for p in caught.value.problems} == {code}
    assert not given["out"].exists()
    return str(caught.value)


@pytest.mark.parametrize("damage", ["flip", "missing"])
def test_d4_a_damaged_newest_checkpoint_is_named_and_passed_over(
    arguments: Arguments, damage: str
) -> None:
    given = arguments(steps=5)
    train(**given)
    damaged = given | {
        "out": given["out"].with_name("again"),
        "state": given["state"].with_name("again-state"),
    }
    cut_after(damaged, 4)
    older, newest = sorted(damaged["state"].glob("step-*"))
    shard = next(newest.glob("*.safetensors"))
    if damage == "flip":
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    else:
        shard.unlink()
    notes: list[str] = []

    def hear(kind: str, fields: Mapping[str, object]) -> None:
        if kind == "note":
            notes.append(str(fields["message"]))

    train(**damaged | {"on_event": hear})
    assert newest.name in notes[0]
    assert f"resumed after step {int(older.name[5:])} of 5" in notes[1]
    assert verify(damaged["out"])["files"] == verify(given["out"])["files"]


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_d8_what_is_not_finite_stops_the_step(arguments: Arguments, poison: str) -> None:
    given = arguments(steps=6)
    cut_after(given, 3)
    before = {p.name: verify(p) for p in given["state"].glob("step-*")}
    nan = float("nan")

    def poisoned(self: Any, batch: Any, *, normaliser: float, alpha: float) -> torch.Tensor:
        for parameter in self.objective.parameters():
            parameter.grad = torch.full_like(parameter, nan if poison == "gradient" else 1.0)
        return torch.tensor([nan if poison == "loss" else 1.0, 0.0], dtype=torch.float64)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("paretron.distill.loop.Trainer.forward_backward", poisoned)
        said = refused(given, Code.GATE_NONFINITE)
    (record,) = given["state"].glob("nonfinite-step-*.json")
    assert record.name in said
    assert len(json.loads(record.read_text())["window_ids"]) == given["settings"].global_batch
    assert {p.name: verify(p) for p in given["state"].glob("step-*")} == before
    train(**given)  # with finite numbers it goes on


@pytest.mark.parametrize("what", ["size", "tokens"])
def test_d10_another_vocabulary_is_refused_before_weights_are_read(
    arguments: Arguments, pico: PicoMaker, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    given = arguments()
    if what == "size":
        given["student"] = pico(name="other", vocab_size=300, num_hidden_layers=2)
    else:
        tokenizer = given["student"] / "tokenizer.json"
        content = json.loads(tokenizer.read_text())
        content["model"]["merges"] = content["model"]["merges"][:-1]
        tokenizer.write_text(json.dumps(content))
    hashes = [
        hashlib.sha256((given[who] / "tokenizer.json").read_bytes()).hexdigest()
        for who in ("student", "teacher")
    ]
    monkeypatch.setattr("paretron.distill.stage.load_model", None)
    said = refused(given, Code.INPUT_TOKENIZER)
    assert all(found in said for found in hashes)


def test_d11_a_teacher_is_never_changed(arguments: Arguments) -> None:
    given = arguments(steps=2)
    made: list[Teacher] = []
    init = Teacher.__init__

    def kept(self: Teacher, *arguments: Any, **named: Any) -> None:
        init(self, *arguments, **named)
        made.append(self)

    before = load_model(given["teacher"]).state_dict()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Teacher, "__init__", kept)
        train(**given)
    (teacher,) = made
    assert not any(module.training for module in teacher.model.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.model.parameters())
    after = teacher.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-3)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_d12_a_chunked_loss_is_its_formula_in_fp64(
    name: str, dtype: torch.dtype, limit: float, temperature: float
) -> None:
    """An odd vocabulary, masked positions, a softcap, a padded head, chunks that do not divide."""
    generator = torch.Generator().manual_seed(0)

    def head(width: int) -> DeferredLogits:
        hidden = torch.randn(13, width, generator=generator).to(dtype)
        weight = torch.randn(61, width, generator=generator).to(dtype)
        return DeferredLogits(hidden, weight, LogitRule(2.0, 5.0), tokens=57)

    student, teacher = head(7), head(11)
    labels = torch.randint(57, (13,), generator=generator)
    labels[::4] = IGNORE
    make, plain = LOSSES[name]
    student.hidden.requires_grad_()
    student.weight.requires_grad_()
    found = fused_divergence(
        student, teacher, labels, divergence=make(temperature), normaliser=3.0, chunk=5
    )
    found.backward()
    hidden, weight = (
        x.detach().double().requires_grad_() for x in (student.hidden, student.weight)
    )
    exact = DeferredLogits(hidden, weight, student.rule, tokens=57)
    wide = DeferredLogits(teacher.hidden.double(), teacher.weight.double(), teacher.rule, tokens=57)
    wanted = plain(exact.logits(), wide.logits(), labels, temperature) / 3.0
    wanted.sum().backward()
    assert abs(float(found) - float(wanted)) <= limit * abs(float(wanted))
    # A gradient that is stored in bf16 is rounded once.
    rounding = 2**-8 if dtype == torch.bfloat16 else 0.0
    for own, other in ((student.hidden.grad, hidden.grad), (student.weight.grad, weight.grad)):
        assert own is not None
        assert other is not None
        assert float((own - other).norm()) <= (limit + rounding) * float(other.norm())


class Canary:
    """Pickled, it would make a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("manifest", ["none", "foreign"])
def test_d16_a_foreign_state_is_refused_and_no_pickle_is_opened(
    arguments: Arguments, tmp_path: Path, manifest: str
) -> None:
    given = arguments()
    foreign = given["state"] / "step-000009"
    foreign.mkdir(parents=True)
    (foreign / ".metadata").write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    if manifest == "foreign":
        write_manifest(foreign, Provenance(kind="student"))
    said = refused(given, Code.INPUT_MANIFEST)
    assert "step-000009" in said
    assert "to train from the start" in said
    assert not (tmp_path / "canary").exists()


def memory_error_of(given: dict[str, Any]) -> str:
    with pytest.raises(ParetronError) as caught:
        train(**given)
    assert caught.value.exit_code == 4
    return str(caught.value)


def test_d17_out_of_memory_names_what_would_help_and_what_was_needed(
    arguments: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("paretron.distill.loop.Trainer.forward_backward", fail)
    said = memory_error_of(arguments())
    assert "micro_batch" in said
    assert "activation_checkpointing: true" in said
    assert "weights, gradients and moments take" in said
    assert "the peak was" in said
    used = memory_error_of(arguments(activation_checkpointing=True, micro_batch=1))
    assert "activation_checkpointing: true" not in used
    assert "a smaller micro_batch" not in used


@NO_GPU
def test_d17_a_gpu_that_is_full(arguments: Arguments) -> None:
    torch.cuda.set_per_process_memory_fraction(1e-4)
    try:
        assert "micro_batch" in memory_error_of(arguments())
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


class Broken:
    """A tracker whose service is gone."""

    name = "wandb"
    asked = 0

    def log(self, figures: Mapping[str, float], *, tokens: int) -> None:
        self.asked += 1
        raise ConnectionError("network is unreachable")

    def close(self) -> None:
        raise ConnectionError("network is unreachable")


def test_d19_a_tracker_that_fails_is_told_once_and_left_out(arguments: Arguments) -> None:
    given = arguments(steps=3, validate=True)
    train(**given)
    heard: list[tuple[str, Mapping[str, Any]]] = []
    tracker = Broken()
    with Tracked(tracker, then=lambda stage, kind, fields: heard.append((kind, fields))) as tracked:
        other = given | {
            "out": given["out"].with_name("tracked"),
            "state": given["state"].with_name("tracked-state"),
            "on_event": lambda kind, fields: tracked("distill", kind, fields),
        }
        train(**other)
    notes = [str(f["message"]) for k, f in heard if k == "note" and "left out" in f["message"]]
    assert len(notes) == 1
    assert "wandb" in notes[0]
    assert "network is unreachable" in notes[0]
    assert tracker.asked == 1
    assert len([k for k, _ in heard if k == "step"]) == 3
    assert verify(other["out"])["files"] == verify(given["out"])["files"]
