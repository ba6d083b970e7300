"""A teacher asked once: captured, continued, read back, refused, and learned from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from makers import PicoMaker
from paretron.artifacts.manifest import Provenance, verify
from paretron.artifacts.models import load_model
from paretron.data.store import TokenStore
from paretron.distill.batches import Windows
from paretron.distill.capture import stage
from paretron.distill.capture.cache import HEADER, Cache
from paretron.distill.capture.stage import capture
from paretron.distill.capture.teacher import CapturedTeacher
from paretron.distill.fused import DeferredLogits
from paretron.distill.objective import Teacher
from paretron.distill.preflight import check_teacher
from paretron.distill.stage import train
from paretron.errors import Code, ParetronError
from paretron.recipe import Distill
from paretron.recipe.training import Loss

SEQ_LEN = 32
Arguments = Callable[..., dict[str, Any]]
Captured = Callable[..., Path]


@pytest.fixture
def captured(arguments: Arguments, tmp_path: Path) -> Captured:
    """Capture the teacher of `arguments` in small files; `changed` are arguments of `capture`."""
    given = arguments()

    def make(*, name: str = "captured", top_k: int | None = 64, **changed: Any) -> Path:
        loss = {"top_k": top_k} | changed.pop("loss", {})
        settings = Distill(
            tokens=8 * SEQ_LEN, global_batch=8, micro_batch=4, dtype="float32", loss=loss
        )
        wanted: dict[str, Any] = {
            "kind": "top_k",
            "settings": settings,
            "seq_len": SEQ_LEN,
            "apart": False,
            "out": tmp_path / name,
            "state": tmp_path / f".{name}.state",
            "provenance": Provenance(kind="capture", stamp="TEST"),
            "file_bytes": 100_000,
            "on_event": lambda kind, fields: None,
        }
        capture(given["teacher"], given["train_tokens"], **wanted | changed)
        return tmp_path / name

    return make


def losses(arguments: Arguments, teacher: Path | None = None, **settings: Any) -> list[float]:
    given = arguments(steps=10, **settings)
    if teacher is not None:
        given["teacher"] = teacher
    train(**given)
    metrics = json.loads((given["out"] / "metrics.json").read_text())
    shutil.rmtree(given["out"])
    shutil.rmtree(given["state"])
    return [step["loss"] for step in metrics["train"]]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def problems(call: Callable[..., object], *args: Any, **kwargs: Any) -> list[Any]:
    with pytest.raises(ParetronError) as caught:
        call(*args, **kwargs)
    return list(caught.value.problems)


@pytest.mark.parametrize("labels", [0.0, 0.3])
def test_a_training_from_it_is_the_live_one_within_quantisation(
    arguments: Arguments, captured: Captured, monkeypatch: pytest.MonkeyPatch, labels: float
) -> None:
    loss = {"top_k": 64, "labels": labels}
    live = losses(arguments, loss=loss)
    folder = captured()
    assert verify(folder)["kind"] == "capture"
    monkeypatch.setattr("paretron.distill.stage.Teacher", None)  # no teacher in memory
    offline = losses(arguments, folder, loss=loss)
    assert offline == pytest.approx(live, abs=1e-3)
    assert offline != live


def test_almost_the_whole_vocabulary_is_the_plain_loss(
    arguments: Arguments, captured: Captured
) -> None:
    live = losses(arguments)
    offline = losses(arguments, captured(top_k=319), loss={"top_k": 319})
    assert offline == pytest.approx(live, abs=1e-3)


@pytest.mark.parametrize("logits", ["forward_kl", "jsd"])
def test_hidden_states_give_the_exact_loss(
    arguments: Arguments, captured: Captured, logits: str
) -> None:
    live = losses(arguments, loss={"logits": logits})
    offline = losses(arguments, captured(kind="hidden"), loss={"logits": logits})
    assert offline == pytest.approx(live, rel=1e-6)


@pytest.mark.parametrize("family", ["gemma2", "granite"])
def test_caps_and_divisors_are_kept(
    family: str, pico: PicoMaker, arguments: Arguments, captured: Captured
) -> None:
    given = arguments()
    shutil.rmtree(given["teacher"])
    pico(family, name="teacher", seed=5, num_hidden_layers=2)
    windows = Windows(TokenStore.open(given["train_tokens"]), SEQ_LEN, 320)
    batch = windows.batch([3, 0])
    live = Teacher(load_model(given["teacher"])).predict(batch).logits
    cache = Cache.open(captured(kind="hidden"), hashes=True)
    found = CapturedTeacher(cache, torch.device("cpu")).predict(batch).logits
    assert isinstance(found, DeferredLogits)
    assert found.rule == live.rule
    assert torch.allclose(found.logits(), live.logits(), atol=1e-5)


def test_an_interrupted_capture_continues_to_the_same_bytes(
    captured: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = contents(captured(name="whole"))
    assert len(whole) > 4
    written: list[int] = []
    write = stage._write_file

    def dies(job: Any, header: Any, number: int, *rest: Any) -> None:
        if len(written) == 2:
            (job.state / ".windows-00002.bin").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(number)
        write(job, header, number, *rest)

    monkeypatch.setattr(stage, "_write_file", dies)
    with pytest.raises(KeyboardInterrupt):
        captured(name="resumed")
    assert not (tmp_path / "resumed").exists()

    def goes_on(job: Any, header: Any, number: int, *rest: Any) -> None:
        assert number not in written
        write(job, header, number, *rest)

    monkeypatch.setattr(stage, "_write_file", goes_on)
    assert contents(captured(name="resumed")) == whole


def test_a_state_of_another_capture_is_refused_by_field(captured: Captured, tmp_path: Path) -> None:
    state = tmp_path / ".captured.state"
    captured()
    out = tmp_path / "captured"
    shutil.rmtree(out)
    found = problems(captured, top_k=32, loss={"temperature": 2.0})
    assert {p.code for p in found} == {Code.RUN_MISMATCH}
    assert {p.cause.split()[0] for p in found} == {"top_k", "temperature", "windows_per_file"}
    header = json.loads((state / HEADER).read_text())
    (state / HEADER).write_text(json.dumps(header | {"teacher": "another"}))
    (teacher,) = problems(captured)
    assert teacher.cause.startswith("teacher was another")
    captured(overwrite=True)
    verify(out)


def test_a_full_disk_is_told_and_the_same_command_continues(
    captured: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = stage.os.fsync
    calls: list[int] = []

    def full(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        fsync(fd)

    monkeypatch.setattr(stage.os, "fsync", full)
    (problem,) = problems(captured)
    assert problem.code is Code.DISK
    assert problem.code.exit == 4
    monkeypatch.setattr(stage.os, "fsync", fsync)
    verify(captured())


def test_another_text_length_or_loss_is_refused_by_field(
    arguments: Arguments, captured: Captured
) -> None:
    folder = captured()
    given = arguments(loss={"top_k": 64}) | {"teacher": folder}

    def fields(**changed: Any) -> set[str]:
        found = problems(train, **given | changed)
        assert {p.code for p in found} == {Code.RUN_MISMATCH}
        return {p.cause.split()[0] for p in found}

    assert fields(seq_len=16) == {"seq_len", "num_windows"}
    assert fields(apart=True) == {"documents"}
    other = arguments(loss={"top_k": 32, "temperature": 2.0})["settings"]
    assert fields(settings=other) == {"top_k", "temperature"}
    assert fields(settings=arguments(loss={"logits": "reverse_kl"})["settings"]) == {"top_k"}
    tokenizer = given["student"] / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    assert fields() == {"tokenizer"}
    shard = given["train_tokens"] / "tokens-00000.bin"
    shard.write_bytes(bytes(2) + shard.read_bytes()[2:])
    assert "tokens" in fields()


def test_states_that_were_not_captured_are_refused(
    arguments: Arguments, captured: Captured
) -> None:
    loss = {"top_k": 64, "states": {"embedding": True}}
    (problem,) = problems(train, **arguments(loss=loss) | {"teacher": captured()})
    assert problem.code is Code.RECIPE_VALUE


def _flip(folder: Path) -> None:
    path = folder / "windows-00001.bin"
    data = bytearray(path.read_bytes())
    data[1000] ^= 4
    path.write_bytes(data)


def _cut(folder: Path) -> None:
    path = folder / "windows-00002.bin"
    path.write_bytes(path.read_bytes()[:-1])


def _lose(folder: Path) -> None:
    (folder / "windows-00000.bin").unlink()


def _other_version(folder: Path) -> None:
    header = json.loads((folder / HEADER).read_text())
    (folder / HEADER).write_text(json.dumps(header | {"schema": 2}))


def _garbage(folder: Path) -> None:
    (folder / HEADER).write_text("{")


def _foreign(folder: Path) -> None:
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("harm", "code", "where"),
    [
        (_flip, Code.INPUT_MANIFEST, "windows-00001.bin"),
        (_cut, Code.INPUT_MANIFEST, "windows-00002.bin"),
        (_lose, Code.INPUT_MANIFEST, "windows-00000.bin"),
        (_other_version, Code.INPUT_CONFIG, HEADER),
        (_garbage, Code.INPUT_CONFIG, HEADER),
        (_foreign, Code.INPUT_MANIFEST, "captured"),
    ],
)
def test_a_damaged_folder_is_found_before_a_weight_is_read(
    arguments: Arguments, captured: Captured, monkeypatch: pytest.MonkeyPatch,
    harm: Callable[[Path], None], code: Code, where: str,
) -> None:  # fmt: skip
    folder = captured()
    harm(folder)
    monkeypatch.setattr("paretron.distill.stage.load_model", None)
    (problem, *_) = problems(train, **arguments(loss={"top_k": 64}) | {"teacher": folder})
    assert problem.code is code
    assert problem.where.endswith(where)
    assert code.exit == 3


def test_a_random_teacher_is_refused_when_captured_and_when_learned_from(
    arguments: Arguments, captured: Captured
) -> None:
    (finding, *_) = problems(captured, provenance=Provenance(kind="capture"))
    assert finding.code is Code.GATE_PREFLIGHT
    assert "no better than guessing among 320 tokens" in finding.cause
    teacher = CapturedTeacher(Cache.open(captured(name="c"), hashes=True), torch.device("cpu"))
    windows = Windows(TokenStore.open(arguments()["train_tokens"]), SEQ_LEN, 320)
    batch = windows.batch(range(4))
    check_teacher(teacher, batch, vocab_size=320, untrained=True)
    (finding, *_) = problems(check_teacher, teacher, batch, vocab_size=320, untrained=False)
    assert "no better than guessing" in finding.cause


def test_a_teacher_that_overflows_is_not_captured(
    captured: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "check_teacher", lambda *a, **k: None)
    load = stage.load_model

    def broken(*args: Any, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        model.model.norm.weight.data.fill_(float("inf"))
        return model

    monkeypatch.setattr(stage, "load_model", broken)
    for kind in ("top_k", "hidden"):
        (problem,) = problems(captured, name=kind, kind=kind)
        assert problem.code is Code.GATE_NONFINITE


def test_running_out_of_memory_comes_with_advice_and_less_at_once_goes_on(
    captured: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = captured(name="whole")
    asked = 0

    def fails(self: Teacher, batch: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked > 20:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return predict(self, batch)

    predict = Teacher.predict
    monkeypatch.setattr(Teacher, "predict", fails)
    with pytest.raises(ParetronError) as caught:
        captured()
    (problem,) = caught.value.problems
    assert problem.code is Code.MEMORY
    assert "Tried to allocate 2.00 GiB; weights take 0.00 GB here" in problem.cause
    assert "a smaller micro_batch, or dtype: bfloat16" in problem.fix
    monkeypatch.setattr(Teacher, "predict", predict)
    settings = Distill(
        tokens=8 * SEQ_LEN, global_batch=8, micro_batch=2, dtype="float32", loss=Loss(top_k=64)
    )
    again = captured(settings=settings)
    assert verify(again)["files"].keys() == verify(whole)["files"].keys()
