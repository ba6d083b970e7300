from __future__ import annotations

import json
import pickle
import resource
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from makers import PicoMaker
from paretron.artifacts.jsonfile import dump
from paretron.artifacts.manifest import Provenance, verify, write_manifest
from paretron.artifacts.staging import staged
from paretron.distill.history import History
from paretron.distill.job import Job, store_identity
from paretron.distill.optimizer import adamw
from paretron.distill.stage import train
from paretron.distill.state import StateFolder, training_tensors
from paretron.errors import Code, ParetronError
from paretron.recipe import Correct, Distill, Pretrain
from paretron.workers.world import World

Arguments = Callable[..., dict[str, Any]]
SETTINGS = {"training": {"lr": 1e-3, "loss": {"temperature": 1.0}}, "seed": 1}


class Model(torch.nn.Module):
    """One matrix, one vector, and a few steps of training behind it."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(5, 3)
        self.optimizer = adamw(self.linear, Distill(tokens=1))
        for _ in range(steps):
            self.linear(torch.randn(4, 5)).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def tensors(self, step: int) -> dict[str, torch.Tensor]:
        return training_tensors(self.linear, self.optimizer, step=step)


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def state(tmp_path: Path, notes: list[str]) -> StateFolder:
    def note(kind: str, fields: Mapping[str, object]) -> None:
        notes.append(str(fields["message"]))

    return StateFolder(tmp_path / "state", SETTINGS, World(0, 1, torch.device("cpu")), note)


def history(step: int) -> History:
    out = History()
    out.add_step(tokens=step, loss=0.1 * step, lr=1e-3, grad_norm=1.0, parts={})
    return out


def save(state: StateFolder, *steps: int) -> None:
    for step in steps:
        state.save(step, Model(step).tensors(step), history(step))


def names(state: StateFolder) -> list[str]:
    return sorted(p.name for p in state.folder.iterdir())


def test_what_was_saved_comes_back_bit_for_bit(state: StateFolder) -> None:
    saved, fresh = Model(3), Model(0)
    state.save(3, saved.tensors(3), history(3))
    step, curve = state.resume(fresh.tensors(0))
    fresh.tensors(step)
    assert step == 3
    assert curve == history(3)
    for name, tensor in saved.tensors(3).items():
        assert torch.equal(fresh.tensors(3)[name], tensor), name
    for a, b in zip(saved.linear.parameters(), fresh.linear.parameters(), strict=True):
        counters = saved.optimizer.state[a]["step"], fresh.optimizer.state[b]["step"]
        assert counters == (3.0, 3.0)


def test_an_empty_folder_starts_at_zero(state: StateFolder) -> None:
    assert state.resume(Model(0).tensors(0)) == (0, History())


def test_the_newest_two_are_kept_and_nothing_else(state: StateFolder) -> None:
    save(state, 1, 2, 3, 4)
    assert names(state) == ["step-000003", "step-000004"]
    assert state.resume(Model(0).tensors(0))[0] == 4


def test_no_file_of_a_checkpoint_is_a_pickle(state: StateFolder) -> None:
    save(state, 1)
    kinds = {p.suffix for p in (state.folder / "step-000001").iterdir()}
    assert kinds == {".safetensors", ".json"}


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "add", "manifest"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    state: StateFolder, notes: list[str], damage: str
) -> None:
    save(state, 2, 4)
    shard = next((state.folder / "step-000004").glob("*.safetensors"))
    if damage == "flip":
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
    elif damage == "truncate":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "remove":
        shard.unlink()
    elif damage == "add":
        (shard.parent / "more").write_text("x")
    else:
        shard.with_name("manifest.json").unlink()
    assert state.resume(Model(0).tensors(0))[0] == 2
    assert len(notes) == 1
    assert "step-000004" in notes[0]
    save(state, 4)  # its place can be taken
    assert state.resume(Model(0).tensors(0))[0] == 4


def test_when_none_is_intact_nothing_starts_over_silently(state: StateFolder) -> None:
    save(state, 2, 4)
    for shard in state.folder.rglob("*.safetensors"):
        shard.write_bytes(b"")
    with pytest.raises(ParetronError) as caught:
        state.resume(Model(0).tensors(0))
    assert caught.value.exit_code == 3
    assert {p.code for p in caught.value.problems} == {Code.INPUT_MANIFEST}
    assert "step-000004" in caught.value.problems[0].where


class Canary:
    """Pickled, it would make a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("manifest", ["none", "foreign", "own"])
def test_a_foreign_folder_is_refused_and_no_pickle_is_opened(
    state: StateFolder, tmp_path: Path, manifest: str
) -> None:
    foreign = state.folder / "step-000009"
    foreign.mkdir(parents=True)
    (foreign / ".metadata").write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    if manifest == "foreign":
        write_manifest(foreign, Provenance(kind="student"))
    elif manifest == "own":  # a forged one: still nothing in it is unpickled
        write_manifest(foreign, Provenance(kind="training-state", settings=SETTINGS))
    with pytest.raises(ParetronError) as caught:
        state.resume(Model(0).tensors(0))
    assert caught.value.exit_code == 3
    assert not (tmp_path / "canary").exists()


def test_other_settings_are_refused_by_name(state: StateFolder) -> None:
    save(state, 1)
    other = {"training": {"lr": 2e-3, "loss": {"temperature": 3.0}}, "seed": 1}
    with pytest.raises(ParetronError) as caught:
        replace(state, settings=other).resume(Model(0).tensors(0))
    assert caught.value.exit_code == 2
    causes = [p.cause for p in caught.value.problems]
    assert len(causes) == 2
    assert "training.loss.temperature was 1.0" in causes[0]
    assert "training.lr was 0.001" in causes[1]
    assert "now it is 0.002" in causes[1]


def test_leftovers_of_a_killed_process_are_removed(state: StateFolder) -> None:
    save(state, 1)
    (state.folder / ".step-000002.staging").mkdir()
    (state.folder / ".step-000002.staging" / "half").write_text("x")
    (state.folder / ".step-000000.old").mkdir()
    (state.folder / ".step-000002.lock").write_text("")
    state.resume(Model(0).tensors(0))
    assert names(state) == ["step-000001"]


def test_a_full_disk_keeps_the_checkpoint_before(state: StateFolder) -> None:
    save(state, 1)
    model = torch.nn.Linear(512, 512)
    tensors = training_tensors(model, adamw(model, Distill(tokens=1)), step=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(ParetronError) as caught:
            state.save(2, tensors, history(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.problems[0].code is Code.DISK
    assert [n for n in names(state) if not n.startswith(".")] == ["step-000001"]
    verify(state.folder / "step-000001")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"lr": 1e-3}, "training.lr"),
        ({"loss": {"temperature": 2.0}}, "training.loss.temperature"),
        ({"clip": 2.0}, "training.clip"),
    ],
)
def test_a_training_does_not_go_on_with_other_settings(
    arguments: Arguments, change: dict[str, Any], field: str
) -> None:
    interrupted(arguments(steps=4))
    with pytest.raises(ParetronError) as caught:
        train(**arguments(steps=4, **change))
    (problem,) = caught.value.problems
    assert problem.code is Code.RUN_MISMATCH
    assert field in problem.cause


def test_with_overwrite_other_settings_start_over(arguments: Arguments) -> None:
    heard: list[str] = []

    def listen(kind: str, fields: Mapping[str, object]) -> None:
        heard.append(f"{kind} {fields.get('message') or fields.get('step')}")

    interrupted(arguments(steps=4))
    train(**arguments(steps=4, lr=1e-3, on_event=listen), overwrite=True)
    assert "checkpoints removed: training.lr" in heard[0]
    assert "step 1" in heard


def test_a_training_does_not_go_on_with_another_text_or_teacher(
    arguments: Arguments, pico: PicoMaker
) -> None:
    given = arguments(steps=4)
    interrupted(given)
    for file in (
        given["teacher"] / "model.safetensors",
        given["train_tokens"] / "tokens-00000.bin",
    ):
        before = file.read_bytes()
        changed = bytearray(before)
        changed[-2] ^= 1
        file.write_bytes(changed)
        with pytest.raises(ParetronError) as caught:
            train(**given)
        assert caught.value.problems[0].code is Code.RUN_MISMATCH
        assert "inputs." in caught.value.problems[0].cause
        file.write_bytes(before)
    train(**given)


def test_it_may_go_on_with_a_smaller_micro_batch(arguments: Arguments) -> None:
    interrupted(arguments(steps=4, micro_batch=8))
    train(**arguments(steps=4, micro_batch=2, checkpoint_every=3))


def interrupted(given: dict[str, Any]) -> None:
    """Start a training and stop it after its second step."""

    def stop(kind: str, fields: Mapping[str, object]) -> None:
        if kind == "step" and fields["step"] == 2:
            raise KeyboardInterrupt

    checkpointed = given["settings"].model_copy(update={"checkpoint_every": 1})
    with pytest.raises(KeyboardInterrupt):
        train(**given | {"settings": checkpointed, "on_event": stop})
    assert (given["state"] / "step-000001").is_dir()


def test_a_store_is_known_by_its_bytes_wherever_its_manifest_stands(
    tokens: Path, tmp_path: Path
) -> None:
    alone = store_identity(tokens)
    with staged(tmp_path / "data", provenance=Provenance(kind="data")) as folder:
        (folder / "train").mkdir()
        (folder / "other").mkdir()
        (folder / "other" / "file").write_text("x")
        for file in tokens.iterdir():
            (folder / "train" / file.name).write_bytes(file.read_bytes())
    assert store_identity(tmp_path / "data" / "train") == alone
    header = json.loads((tokens / "tokens.json").read_text())
    dump(tokens / "tokens.json", header | {"num_tokens": 1})
    assert store_identity(tokens) != alone


@pytest.mark.parametrize("kind", [Distill, Correct, Pretrain])
def test_a_job_survives_the_way_to_a_worker(arguments: Arguments, kind: type) -> None:
    given = arguments()
    del given["on_event"]
    extra: dict[str, Any] = {"tokens": 10, "global_batch": 2, "min_lr": 0.0}
    if kind is Pretrain:
        extra |= {
            "config": {"model_type": "llama"},
            "tokenizer": {"vocab_size": 400},
            "data": {"path": "x.txt"},
        }
    job = Job(**given | {"settings": kind(**extra)}, overwrite=False)
    assert Job.from_json(job.to_json()) == job
