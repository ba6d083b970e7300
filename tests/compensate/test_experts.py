"""Refit of experts: against fp64 by hand, what few and no tokens do, and whole students."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import silu

from makers import PicoMaker
from paretron.compensate.experts import ExpertTokens
from picocompensated import compensated, stream_errors

TOKENS, COUNT, WIDTH, NEURONS = 60, 4, 8, 6


@dataclass
class _Experts:
    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor
    act_fn: Any


@dataclass
class _Case:
    """Experts 0 to 2 have tokens, the last of them two, expert 3 none."""

    experts: _Experts
    read: torch.Tensor
    choices: torch.Tensor
    weights: torch.Tensor
    missing: torch.Tensor

    @classmethod
    def make(cls) -> _Case:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        experts = _Experts(random(COUNT, 2 * NEURONS, WIDTH), random(COUNT, WIDTH, NEURONS), silu)
        choices = torch.tensor([0, 1]).repeat(TOKENS, 1)
        choices[:2, 1] = 2
        weights = torch.softmax(random(TOKENS, 2), -1)
        return cls(experts, random(TOKENS, WIDTH), choices, weights, random(TOKENS, WIDTH))

    def added(self, folder: Path, *, ridge: float) -> dict[int, torch.Tensor]:
        folder.mkdir()
        seen = ExpertTokens(folder, TOKENS, WIDTH)
        for part in (slice(0, 23), slice(23, None)):
            rows = (self.read, self.choices, self.weights, self.missing)
            seen.add(*(x[part] for x in rows))
        return dict(seen.fits(self.experts, ridge=ridge))

    def neurons(self, e: int) -> tuple[torch.Tensor, torch.Tensor]:
        """An expert's tokens, and what its matrix reads of them times their weight, fp64."""
        tokens, places = torch.where(self.choices == e)
        gate, up = (self.read[tokens] @ self.experts.gate_up_proj[e].T).double().chunk(2, -1)
        return tokens, silu(gate) * up * self.weights[tokens, places, None].double()


def test_one_expert_after_another_as_by_hand(tmp_path: Path) -> None:
    case, ridge = _Case.make(), 0.01
    found = case.added(tmp_path / "a", ridge=ridge)
    assert sorted(found) == [0, 1, 2]  # no token, nothing added
    missing, even = case.missing.double(), 2 * TOKENS / COUNT
    for e in range(3):
        tokens, a = case.neurons(e)
        inputs = a.T @ a
        more = ridge * inputs.diagonal().mean() * max(1.0, even / len(tokens))
        inputs += more * torch.eye(NEURONS, dtype=torch.float64)
        expected = torch.linalg.solve(inputs, a.T @ missing[tokens]).T
        torch.testing.assert_close(found[e].double(), expected, rtol=1e-4, atol=1e-5)
        missing[tokens] -= a @ expected.T
    assert float(missing.square().sum()) < 0.9 * float(case.missing.square().sum())


def test_few_tokens_move_an_expert_less(tmp_path: Path) -> None:
    """Fitted alone with the plain ridge, its two tokens would have been met almost exactly."""
    case = _Case.make()
    found = case.added(tmp_path / "a", ridge=0.3)
    tokens, a = case.neurons(2)
    left = case.missing.double()
    for e in range(2):
        some, b = case.neurons(e)
        left[some] -= b @ found[e].double().T
    inputs = a.T @ a
    inputs += 0.3 * inputs.diagonal().mean() * torch.eye(NEURONS, dtype=torch.float64)
    alone = torch.linalg.solve(inputs, a.T @ left[tokens]).T
    assert float(found[2].norm()) < 0.5 * float(alone.norm())


@pytest.mark.parametrize("new", [{"moe_ffn": 16}, {"experts": 2}])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_refitted_experts_bring_the_stream_nearer(
    pico: PicoMaker, family: str, new: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Removed neurons, or removed experts whose tokens go to the others."""
    model = pico(family)
    fitted = stream_errors(model, ridge=0.01, count=6, length=40, **new)
    monkeypatch.setattr(ExpertTokens, "fits", lambda self, experts, *, ridge: iter(()))
    around = stream_errors(model, ridge=0.01, count=6, length=40, **new)
    assert all(a < b for a, b in zip(fitted, around, strict=True))
    assert fitted[-1] < 0.7 * around[-1]


def test_the_files_of_a_layer_do_not_stay(pico: PicoMaker, tmp_path: Path) -> None:
    model, out = pico("mixtral"), tmp_path / "students" / "out"
    compensated(model, out, new={"moe_ffn": 16}, count=4)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
