from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from paretron.distill.fused import fused_cross_entropy, fused_forward_kl
from paretron.distill.losses import IGNORE, cross_entropy, forward_kl

SHAPES = [(1, 3, 5, 4), (64, 123, 252, 31), (37, 16, 507, 123), (5, 48, 140_001, 7)]


@dataclass
class Inputs:
    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor

    @property
    def valid(self) -> Tensor:
        return self.labels != IGNORE


def inputs(
    positions: int,
    hidden: int,
    vocab: int,
    teacher_hidden: int,
    *,
    mask: str = "some",
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    random = torch.Generator().manual_seed(positions * vocab)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=random)).to(dtype)

    labels = torch.randint(vocab, (positions,), generator=random)
    if mask == "some":
        labels[torch.rand(positions, generator=random) < 0.4] = IGNORE
    elif mask == "none":
        labels[:] = IGNORE
    return Inputs(
        draw(positions, hidden).requires_grad_(),
        draw(vocab, hidden, scale=2 * hidden**-0.5).requires_grad_(),
        draw(positions, teacher_hidden),
        draw(vocab, teacher_hidden, scale=2 * teacher_hidden**-0.5),
        labels,
    )


def reference(x: Inputs, temperature: float | None, normaliser: float) -> tuple[Tensor, ...]:
    """Loss and gradients in fp64 from the plain formula; temperature None means cross entropy."""
    hidden = x.hidden.detach().double().requires_grad_()
    weight = x.weight.detach().double().requires_grad_()
    student = hidden @ weight.t()
    if temperature is None:
        loss = cross_entropy(student, x.labels)
    else:
        teacher = x.teacher_hidden.double() @ x.teacher_weight.double().t()
        loss = forward_kl(student, teacher, valid=x.valid, temperature=temperature)
    loss = loss / normaliser
    return (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))


def fused(
    x: Inputs, temperature: float | None, normaliser: float, chunk: int | None
) -> tuple[Tensor, ...]:
    if temperature is None:
        loss = fused_cross_entropy(x.hidden, x.weight, x.labels, normaliser=normaliser, chunk=chunk)
    else:
        loss = fused_forward_kl(
            x.hidden,
            x.weight,
            x.teacher_hidden,
            x.teacher_weight,
            valid=x.valid,
            temperature=temperature,
            normaliser=normaliser,
            chunk=chunk,
        )
    loss.backward()
    assert x.hidden.grad is not None
    assert x.weight.grad is not None
    return loss.detach(), x.hidden.grad, x.weight.grad


def error(found: Tensor, expected: Tensor) -> float:
    """Relative to the largest element, so that elements near zero may round."""
    scale = float(expected.abs().max())
    return float((found.double() - expected).abs().max()) / (scale or 1.0)


@pytest.mark.parametrize("temperature", [None, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("mask", ["all", "some"])
@pytest.mark.parametrize("chunk", [None, 1, 7])
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradients_against_fp64(
    shape: tuple[int, int, int, int], chunk: int | None, mask: str, temperature: float | None
) -> None:
    expected = reference(inputs(*shape, mask=mask), temperature, 3.7)
    found = fused(inputs(*shape, mask=mask), temperature, 3.7, chunk)
    assert error(found[0], expected[0]) < 1e-6
    # fp32 products sum over the whole vocabulary, one position at a time at worst
    assert error(found[1], expected[1]) < 5e-5
    assert error(found[2], expected[2]) < 5e-5


@pytest.mark.parametrize("temperature", [None, 1.0, 3.0])
def test_bf16_inputs_keep_fp32_accuracy(temperature: float | None) -> None:
    """Only the gradients' own storage may round: 2^-9 of each element."""
    expected = reference(inputs(37, 64, 507, 123, dtype=torch.bfloat16), temperature, 20.0)
    found = fused(inputs(37, 64, 507, 123, dtype=torch.bfloat16), temperature, 20.0, 8)
    assert found[1].dtype == found[2].dtype == torch.bfloat16
    assert error(found[0], expected[0]) < 1e-5
    for gradient, exact in zip(found[1:], expected[1:], strict=True):
        assert float((gradient.double() - exact).norm() / exact.norm()) < 2**-8


def test_fp64_inputs_are_computed_in_fp64() -> None:
    x = inputs(9, 8, 21, 5, dtype=torch.float64)
    expected = reference(inputs(9, 8, 21, 5, dtype=torch.float64), 2.0, 1.0)
    for a, b in zip(fused(x, 2.0, 1.0, 4), expected, strict=True):
        assert error(a, b) < 1e-13


def test_the_teacher_against_itself_is_exactly_zero() -> None:
    x = inputs(40, 32, 507, 32, mask="all")
    weight = x.weight.detach()
    loss = fused_forward_kl(x.hidden, x.weight, x.hidden.detach(), weight, chunk=16)
    loss.backward()
    assert loss.item() == 0.0
    assert x.hidden.grad is not None
    assert float(x.hidden.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("temperature", [None, 1.0])
def test_no_valid_position_gives_no_loss_and_zero_gradients(temperature: float | None) -> None:
    loss, grad_hidden, grad_weight = fused(inputs(6, 8, 21, 5, mask="none"), temperature, 1.0, 4)
    assert loss.item() == 0.0
    assert not grad_hidden.any()
    assert not grad_weight.any()


def test_a_factor_after_the_loss_scales_the_gradients_every_time() -> None:
    once = fused(inputs(10, 8, 21, 5), 1.0, 1.0, 4)
    x = inputs(10, 8, 21, 5)
    loss = fused_forward_kl(
        x.hidden, x.weight, x.teacher_hidden, x.teacher_weight, valid=x.valid, chunk=4
    )
    (3 * loss).backward(retain_graph=True)
    assert x.weight.grad is not None
    torch.testing.assert_close(x.weight.grad, 3 * once[2])
    (2 * loss).backward()
    torch.testing.assert_close(x.weight.grad, 5 * once[2])


def test_frozen_inputs_get_no_gradient_and_evaluation_makes_none() -> None:
    x = inputs(10, 8, 21, 5)
    x.weight.requires_grad_(False)
    fused_cross_entropy(x.hidden, x.weight, x.labels).backward()
    assert x.hidden.grad is not None
    assert x.weight.grad is None
    with torch.no_grad():
        loss = fused_cross_entropy(x.hidden, x.weight, x.labels)
    assert not loss.requires_grad
    assert error(loss, reference(inputs(10, 8, 21, 5), None, 1.0)[0]) < 1e-6


def test_autocast_does_not_reach_inside() -> None:
    plain = fused(inputs(10, 8, 21, 5), 1.0, 1.0, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = fused(inputs(10, 8, 21, 5), 1.0, 1.0, 4)
    for a, b in zip(plain, cast, strict=True):
        assert torch.equal(a, b)


def test_leading_dimensions_are_free() -> None:
    flat, deep = inputs(12, 8, 21, 5), inputs(12, 8, 21, 5)
    expected = fused_cross_entropy(flat.hidden, flat.weight, flat.labels)
    found = fused_cross_entropy(
        deep.hidden.view(3, 4, 8), deep.weight, deep.labels.view(3, 4), chunk=5
    )
    assert abs(found.item() - expected.item()) < 1e-6


_MEMORY = """
import sys, torch
from paretron.distill.fused import fused_forward_kl
from paretron.distill.losses import forward_kl

torch.manual_seed(0)
h, w = torch.randn(1024, 64, requires_grad=True), torch.randn(16000, 64, requires_grad=True)
th, tw = torch.randn(1024, 64), torch.randn(16000, 64)

def resident(field):
    line = next(x for x in open("/proc/self/status") if x.startswith(field))
    return int(line.split()[1]) * 1024

def peak(step):
    open("/proc/self/clear_refs", "w").write("5")  # resets VmHWM
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before

fused = peak(lambda: fused_forward_kl(h, w, th, tw, chunk=128).backward())
plain = peak(lambda: forward_kl(h @ w.t(), th @ tw.t()).backward())
print(fused, plain)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_stays_far_below_the_plain_loss() -> None:
    out = subprocess.run(
        [sys.executable, "-c", _MEMORY],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    fused_bytes, plain_bytes = map(int, out.stdout.split())
    logits_bytes = 1024 * 16000 * 4
    assert plain_bytes > 5 * logits_bytes  # the measurement sees what it should
    assert fused_bytes < 0.15 * plain_bytes
