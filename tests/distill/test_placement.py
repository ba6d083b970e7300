"""What saves memory or time, and must change nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from makers import PicoMaker
from paretron.artifacts.manifest import verify
from paretron.artifacts.models import load_model
from paretron.data.store import TokenStore
from paretron.distill.batches import Batch, Windows
from paretron.distill.fused import DeferredLogits
from paretron.distill.loop import Trainer
from paretron.distill.meter import Meter
from paretron.distill.objective import Teacher
from paretron.distill.parallel import place_teacher
from paretron.distill.stage import train
from paretron.families import family_of
from paretron.families.costs import forward_flops_per_token
from paretron.workers.devices import peak_flop_s
from paretron.workers.world import World

Arguments = Callable[..., dict[str, Any]]
ALONE = World(0, 1, torch.device("cpu"))
STATES = {"states": {"embedding": True, "output": [[1, 0]], "mlp_input": [[0, 1]]}}


def elsewhere(given: dict[str, Any], name: str) -> dict[str, Any]:
    return given | {
        "out": given["out"].with_name(name),
        "state": given["state"].with_name(name[::-1]),
    }


def weights(out: Path) -> Any:
    return verify(out)["files"]["model.safetensors"]


def all_logits(teacher: Teacher, batch: Batch) -> torch.Tensor:
    logits = teacher.predict(batch).logits
    assert isinstance(logits, DeferredLogits)
    return logits.logits()


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
@pytest.mark.parametrize("loss", [{}, STATES], ids=["logits", "states"])
def test_checkpointed_activations_give_the_same_bits(
    arguments: Arguments, family: str, loss: dict[str, Any]
) -> None:
    given = arguments(steps=2, family=family, loss=loss)
    train(**given)
    saving = elsewhere(arguments(steps=2, loss=loss, activation_checkpointing=True), "saving")
    train(**saving)
    assert weights(saving["out"]) == weights(given["out"])


def test_checkpointed_layers_run_again_in_the_backward_pass(
    arguments: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    calls = 0
    forward = LlamaMLP.forward

    def counting(self: Any, x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", counting)
    counts = []
    for on in (False, True):
        calls = 0
        train(
            **elsewhere(arguments(steps=1, activation_checkpointing=on, distil=False), f"on-{on}")
        )
        counts.append(calls)
    assert counts[1] > counts[0]


def test_bf16_is_arithmetic_over_fp32_weights_and_moments(
    arguments: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.dtype] = []
    run = Trainer.run

    def watching(trainer: Trainer) -> Any:
        layer = trainer.objective.student.base_model.layers[0].mlp
        layer.register_forward_hook(lambda _m, _a, out: seen.append(out.dtype))
        history = run(trainer)
        for parameter in trainer.objective.parameters():
            moments = trainer.optimizer.state[parameter]
            found = {parameter.dtype, moments["exp_avg"].dtype, moments["exp_avg_sq"].dtype}
            assert found == {torch.float32}
        return history

    monkeypatch.setattr(Trainer, "run", watching)
    train(**arguments(steps=2, dtype="bfloat16"))
    assert set(seen) == {torch.bfloat16}


def test_an_offloaded_teacher_says_the_same_and_its_layers_rest(
    pico: PicoMaker, tokens: Path
) -> None:
    batch = Windows(TokenStore.open(tokens), 32, 320).batch(range(2))
    folder = pico("llama", num_hidden_layers=2)
    said = all_logits(Teacher(load_model(folder)), batch)
    teacher = Teacher(load_model(folder))
    resting = {n: p.data_ptr() for n, p in teacher.model.named_parameters()}
    place_teacher(teacher.model, ALONE, how="offloaded")
    assert torch.equal(all_logits(teacher, batch), said)
    assert {n: p.data_ptr() for n, p in teacher.model.named_parameters()} == resting


def test_events_tell_memory_and_what_is_known_of_the_speed(arguments: Arguments) -> None:
    steps: list[Mapping[str, Any]] = []

    def hear(kind: str, fields: Mapping[str, object]) -> None:
        if kind == "step":
            steps.append(fields)

    train(**arguments(steps=2, on_event=hear))
    assert all(s["mfu"] is None for s in steps)  # a CPU's rate stands in no table
    assert all(0.05 < s["memory_gb"] < 100 for s in steps)


def test_mfu_counts_the_student_three_times_and_the_teacher_once(pico: PicoMaker) -> None:
    student = load_model(pico("llama", name="s", num_hidden_layers=2))
    teacher = load_model(pico("qwen3", name="t"))
    costs = [
        forward_flops_per_token(family_of(m.config.to_dict()), m.config.to_dict(), seq_len=64)
        for m in (student, teacher)
    ]
    rate = peak_flop_s("NVIDIA H200")
    assert rate == 989e12
    assert peak_flop_s("Some Accelerator") is None
    meter = Meter(student, teacher, torch.device("cpu"), rate)
    found = meter.figures(tokens_per_s=1e6, seq_len=64)["mfu"]
    assert found is not None
    assert math.isclose(found, 1e6 * (3 * costs[0] + costs[1]) / 989e12)
