from __future__ import annotations

import hashlib
import json
import math
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from makers import PicoMaker
from paretron.artifacts.manifest import Provenance, verify
from paretron.artifacts.models import load_model
from paretron.artifacts.reader import Checkpoint
from paretron.data.order import window_id
from paretron.data.store import TokenStore
from paretron.distill import stage
from paretron.distill.optimizer import adamw
from paretron.distill.stage import train
from paretron.errors import Code, ParetronError
from paretron.recipe import Distill
from pico import MOE_FAMILIES, PICO_FAMILIES

Arguments = Callable[..., dict[str, Any]]


def files(folder: Path) -> dict[str, str]:
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.is_file()
    }


def losses(out: Path) -> list[float]:
    return [point["loss"] for point in json.loads((out / "metrics.json").read_text())["train"]]


@pytest.mark.parametrize("family", [*PICO_FAMILIES, *MOE_FAMILIES])
@pytest.mark.parametrize("distil", [True, False])
def test_every_family_learns(arguments: Arguments, family: str, distil: bool) -> None:
    given = arguments(family=family, distil=distil, steps=2)
    before = {name: files(given[name]) for name in ("student", "teacher") if given[name]}
    train(**given)
    assert {name: files(given[name]) for name in before} == before
    manifest = verify(given["out"])
    assert manifest["kind"] == "distill"
    start, end = load_model(given["student"]), load_model(given["out"])
    ids = torch.arange(40).unsqueeze(0)
    assert not torch.equal(start(ids).logits, end(ids).logits)
    assert all(
        not torch.equal(a, b) for a, b in zip(start.parameters(), end.parameters(), strict=True)
    )
    first, second = losses(given["out"])
    assert second < first


def test_a_tied_student_stays_tied(arguments: Arguments, pico: PicoMaker) -> None:
    pico("qwen3", name="student", hidden_size=48, num_hidden_layers=2, tie_word_embeddings=True)
    given = arguments(family="qwen3", steps=2)
    train(**given)
    assert "lm_head.weight" not in Checkpoint.open(given["out"]).entries
    first, second = losses(given["out"])
    assert second < first


def test_the_loss_is_what_the_formula_says(arguments: Arguments) -> None:
    """The first step's loss, recomputed from plain logits in fp64."""
    given = arguments(steps=1)
    train(**given)
    store, seq_len = TokenStore.open(given["train_tokens"]), given["seq_len"]
    windows = store.windows(seq_len)
    first = [window_id(k, num_windows=windows, seed=7) for k in range(8)]
    ids = torch.stack([store.window(i, seq_len) for i in first])
    student, teacher = (load_model(given[n]).double() for n in ("student", "teacher"))
    with torch.no_grad():
        log_q = student(ids).logits[:, :-1].log_softmax(-1)
        log_p = teacher(ids).logits[:, :-1].log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert math.isclose(losses(given["out"])[0], float(expected), rel_tol=1e-5)


def test_micro_batches_do_not_matter(arguments: Arguments) -> None:
    given = arguments(steps=3, micro_batch=8)
    train(**given)
    other = arguments(steps=3, micro_batch=2) | {
        "out": given["out"].with_name("other"),
        "state": given["state"].with_name("other-state"),
    }
    train(**other)
    for a, b in zip(losses(given["out"]), losses(other["out"]), strict=True):
        assert math.isclose(a, b, rel_tol=1e-6)


def test_weights_are_written_as_they_came(arguments: Arguments, pico: PicoMaker) -> None:
    pico("llama", name="student", hidden_size=48, num_hidden_layers=2, dtype="bfloat16")
    given = arguments(steps=2)
    train(**given)
    assert {e.dtype for e in Checkpoint.open(given["out"]).entries.values()} == {"BF16"}
    assert json.loads((given["out"] / "config.json").read_text())["dtype"] == "bfloat16"


def test_bf16_arithmetic_learns_too(arguments: Arguments) -> None:
    given = arguments(steps=4, dtype="bfloat16")
    train(**given)
    found = losses(given["out"])
    assert found[-1] < found[0]


def test_events_and_metrics_tell_the_course(arguments: Arguments) -> None:
    heard: list[tuple[str, Mapping[str, Any]]] = []
    given = arguments(
        steps=4,
        eval_every=2,
        validate=True,
        on_event=lambda kind, fields: heard.append((kind, fields)),
    )
    train(**given)
    steps = [fields for kind, fields in heard if kind == "step"]
    assert [s["step"] for s in steps] == [1, 2, 3, 4]
    assert [s["tokens"] for s in steps] == [256, 512, 768, 1024]
    assert all(s["tokens_per_s"] > 0 and s["eta_s"] >= 0 for s in steps)
    assert steps[-1]["lr"] == given["settings"].min_lr
    assert [f["done"] for kind, f in heard if kind == "progress"] == [256, 512, 768, 1024]
    metrics = json.loads((given["out"] / "metrics.json").read_text())
    assert metrics["objective"] == "forward_kl"
    assert [p["tokens"] for p in metrics["validation"]] == [0, 512, 1024]
    assert [p["loss"] for p in metrics["train"]] == [s["loss"] for s in steps]
    store = TokenStore.open(given["validation_tokens"])
    ids = torch.stack([store.window(i, 256) for i in range(store.windows(256))])
    with torch.no_grad():
        logits = load_model(given["out"])(ids).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert math.isclose(metrics["validation"][-1]["loss"], float(expected), rel_tol=1e-5)


def test_a_loss_that_is_not_finite_stops_the_step_and_keeps_the_state(
    arguments: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(steps=6, checkpoint_every=2)

    def poison(kind: str, fields: Mapping[str, object]) -> None:
        if kind == "step" and fields["step"] == 3:
            monkeypatch.setattr("paretron.distill.loop.Trainer.forward_backward", broken)

    def broken(self: Any, batch: Any, *, normaliser: float, alpha: float) -> torch.Tensor:
        self.objective.student.lm_head.weight.grad = torch.full_like(
            self.objective.student.lm_head.weight, float("nan")
        )
        return torch.tensor([1.0, 0.0], dtype=torch.float64)

    with pytest.raises(ParetronError) as caught:
        train(**given | {"on_event": poison})
    problem = caught.value.problems[0]
    assert problem.code is Code.GATE_NONFINITE
    assert caught.value.exit_code == 5
    assert not given["out"].exists()
    record = json.loads(Path(problem.where).read_text())
    windows = TokenStore.open(given["train_tokens"]).windows(given["seq_len"])
    assert record["step"] == 4
    fourth = [window_id(k, num_windows=windows, seed=7) for k in range(24, 32)]
    assert record["window_ids"] == fourth
    verify(given["state"] / "step-000002")
    assert not (given["state"] / "step-000004").exists()


@pytest.mark.parametrize(
    ("number", "loss"),
    [
        (signal.SIGTERM, {}),
        (signal.SIGINT, {}),
        # The map to the teacher's width and the weight of the step before go on, too.
        (signal.SIGTERM, {"loss": {"states": {"embedding": True, "output": [[1, 0]]}}}),
    ],
)
def test_asked_to_stop_it_saves_and_resumes_to_the_same_bits(
    arguments: Arguments, number: int, loss: dict[str, Any]
) -> None:
    whole = arguments(steps=6, **loss)
    train(**whole)

    def stop(kind: str, fields: Mapping[str, object]) -> None:
        if kind == "step" and fields["step"] == 3:
            os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    parts = arguments(steps=6, on_event=stop, validate=False, **loss) | {
        "out": whole["out"].with_name("parts"),
        "state": whole["state"].with_name("parts-state"),
    }
    with pytest.raises(ParetronError) as caught:
        train(**parts)
    assert caught.value.exit_code == 75
    assert signal.getsignal(number) is handler
    assert not parts["out"].exists()
    assert [p.name for p in parts["state"].glob("step-*")] == ["step-000003"]
    train(**parts | {"on_event": lambda kind, fields: None})
    assert files(parts["out"]) == files(whole["out"])


def test_an_output_that_exists_is_refused_before_any_work(arguments: Arguments) -> None:
    given = arguments()
    given["out"].mkdir()
    with pytest.raises(ParetronError) as caught:
        train(**given)
    assert caught.value.problems[0].code is Code.OUT_EXISTS
    with pytest.raises(ParetronError) as caught:
        train(**given | {"out": given["student"] / "inside"})
    assert caught.value.problems[0].code is Code.OUT_OVERLAP


def test_a_text_of_another_tokenizer_is_refused(arguments: Arguments, pico: PicoMaker) -> None:
    given = arguments(steps=2, distil=False)
    config = json.loads((given["student"] / "config.json").read_text())
    pico("llama", name="small", vocab_size=270, num_hidden_layers=2)
    assert config["vocab_size"] == 320
    with pytest.raises(ParetronError) as caught:
        train(**given | {"student": given["student"].with_name("small")})
    assert caught.value.problems[0].code is Code.INPUT_TOKENIZER


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes"),
        MemoryError(),
    ],
)
def test_running_out_of_memory_comes_with_advice(
    arguments: Arguments, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("paretron.distill.loop.Trainer.forward_backward", fail)
    with pytest.raises(ParetronError) as caught:
        train(**arguments())
    assert caught.value.exit_code == 4
    assert "micro_batch" in caught.value.problems[0].fix


def test_other_errors_stay_what_they_are(
    arguments: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("paretron.distill.loop.Trainer.forward_backward", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        train(**arguments())


def test_the_provenance_is_published_as_given(arguments: Arguments) -> None:
    given = arguments(steps=1)
    provenance = replace(Provenance(kind="x", stamp="TEST"), parents={"a": "b"}, seed=3)
    train(**given | {"provenance": provenance})
    manifest = verify(given["out"])
    assert (manifest["kind"], manifest["parents"], manifest["seed"]) == ("x", {"a": "b"}, 3)


def test_only_matrices_decay(arguments: Arguments) -> None:
    model = load_model(arguments(family="nemotron")["student"])
    decaying, sparing = adamw(model, Distill(tokens=1, weight_decay=0.3)).param_groups
    assert (decaying["weight_decay"], sparing["weight_decay"]) == (0.3, 0.0)
    assert {p.dim() for p in decaying["params"]} == {2}
    assert {p.dim() for p in sparing["params"]} == {1}
    assert len(decaying["params"]) + len(sparing["params"]) == len(list(model.parameters()))


def test_asked_to_stop_while_publishing_is_said_after_it(
    arguments: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too late for the training, in time for what would come next."""
    publish = stage._publish

    def asked_meanwhile(*given: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        publish(*given)

    monkeypatch.setattr(stage, "_publish", asked_meanwhile)
    given = arguments(steps=2)
    with pytest.raises(ParetronError) as caught:
        train(**given)
    assert caught.value.exit_code == 75
    verify(given["out"])
