from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from losscases import LOSSES
from paretron.distill.fused import DeferredLogits, fused_cross_entropy, fused_divergence
from paretron.distill.losses import IGNORE, cross_entropy
from paretron.families import PLAIN, LogitRule

SHAPES = [(1, 3, 5, 4), (64, 123, 252, 31), (37, 16, 507, 123), (5, 48, 140_001, 7)]
RULES = {"plain": PLAIN, "softcap": LogitRule(softcap=2.5), "divided": LogitRule(divisor=7.0)}
Inputs = tuple[DeferredLogits, DeferredLogits, Tensor]


def inputs(
    positions: int,
    hidden: int,
    vocab: int,
    teacher_hidden: int,
    *,
    mask: str = "some",
    dtype: torch.dtype = torch.float32,
    rule: LogitRule = PLAIN,
) -> Inputs:
    """Student, teacher and labels; the same numbers every time."""
    random = torch.Generator().manual_seed(positions * vocab)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=random)).to(dtype)

    labels = torch.randint(vocab, (positions,), generator=random)
    if mask == "some":
        labels[torch.rand(positions, generator=random) < 0.4] = IGNORE
    elif mask == "none":
        labels[:] = IGNORE
    scale = 2 * rule.divisor
    own = draw(positions, hidden), draw(vocab, hidden, scale=scale * hidden**-0.5)
    other = draw(positions, teacher_hidden), draw(vocab, teacher_hidden, scale=2 * hidden**-0.5)
    student = DeferredLogits(own[0].requires_grad_(), own[1].requires_grad_(), rule)
    return student, DeferredLogits(*other, rule), labels


def exact(x: Inputs, loss: str | None, temperature: float, normaliser: float) -> tuple[Tensor, ...]:
    """Loss and gradients in fp64 from the plain formula; without a name, cross entropy."""
    student, teacher, labels = x
    leaves = [t.detach().double().requires_grad_() for t in (student.hidden, student.weight)]
    own = DeferredLogits(leaves[0], leaves[1], student.rule).logits()
    other = DeferredLogits(teacher.hidden.double(), teacher.weight.double(), teacher.rule).logits()
    if loss is None:
        value = cross_entropy(own, labels) / normaliser
    else:
        value = LOSSES[loss][1](own, other, labels, temperature) / normaliser
    return (value.detach(), *torch.autograd.grad(value, leaves))


def fused(
    x: Inputs, loss: str | None, temperature: float, normaliser: float, chunk: int | None
) -> tuple[Tensor, ...]:
    student, teacher, labels = x
    if loss is None:
        value = fused_cross_entropy(student, labels, normaliser=normaliser, chunk=chunk)
    else:
        divergence = LOSSES[loss][0](temperature)
        value = fused_divergence(
            student, teacher, labels, divergence=divergence, normaliser=normaliser, chunk=chunk
        )
    value.backward()
    assert student.hidden.grad is not None
    assert student.weight.grad is not None
    return value.detach(), student.hidden.grad, student.weight.grad


def error(found: Tensor, expected: Tensor) -> float:
    """Relative to the largest element, so that elements near zero may round."""
    scale = float(expected.abs().max())
    return float((found.double() - expected).abs().max()) / (scale or 1.0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("mask", ["all", "some"])
@pytest.mark.parametrize("loss", [None, *LOSSES])
def test_value_and_gradients_against_fp64(
    loss: str | None, mask: str, temperature: float, rule: str
) -> None:
    for shape in SHAPES[:3]:
        for chunk in (None, 7):
            made = [inputs(*shape, mask=mask, rule=RULES[rule]) for _ in range(2)]
            expected = exact(made[0], loss, temperature, 3.7)
            found = fused(made[1], loss, temperature, 3.7, chunk)
            assert error(found[0], expected[0]) < 3e-5  # a KL near zero is a small difference
            # fp32 products sum over the whole vocabulary, one position at a time at worst
            assert error(found[1], expected[1]) < 5e-5
            assert error(found[2], expected[2]) < 5e-5


@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.parametrize("loss", [None, "forward_kl"])
def test_a_large_vocabulary(loss: str | None, chunk: int | None) -> None:
    expected = exact(inputs(*SHAPES[3]), loss, 1.0, 2.0)
    found = fused(inputs(*SHAPES[3]), loss, 1.0, 2.0, chunk)
    assert error(found[0], expected[0]) < 1e-6
    assert error(found[1], expected[1]) < 5e-5
    assert error(found[2], expected[2]) < 5e-5


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("loss", [None, *LOSSES])
def test_bf16_inputs_keep_fp32_accuracy(loss: str | None, temperature: float, rule: str) -> None:
    """Only the gradients' own storage may round: at most 2^-8 of each element."""
    made = [inputs(37, 64, 507, 123, dtype=torch.bfloat16, rule=RULES[rule]) for _ in range(2)]
    expected = exact(made[0], loss, temperature, 20.0)
    found = fused(made[1], loss, temperature, 20.0, 8)
    assert found[1].dtype == found[2].dtype == torch.bfloat16
    assert error(found[0], expected[0]) < 3e-5
    for gradient, wanted in zip(found[1:], expected[1:], strict=True):
        assert torch.allclose(
            gradient.double(), wanted, rtol=2**-8, atol=5e-5 * float(wanted.abs().max())
        )


@pytest.mark.parametrize("loss", [None, *LOSSES])
def test_a_bias_of_the_head_takes_part_and_learns(loss: str | None) -> None:
    """A bias is a channel of the head that always reads one."""
    rule = RULES["divided"]
    own, other, labels = inputs(37, 16, 253, 31, dtype=torch.float64, rule=rule)
    bias = torch.linspace(-9, 9, 253, dtype=torch.float64)
    student = replace(own, bias=bias.clone().requires_grad_())
    teacher = replace(other, bias=bias.flip(0))

    def joined(x: DeferredLogits, bias: Tensor) -> DeferredLogits:
        hidden = torch.cat([x.hidden.detach(), torch.ones(37, 1, dtype=torch.float64)], 1)
        weight = torch.cat([x.weight.detach(), bias.unsqueeze(1)], 1)
        return DeferredLogits(hidden.requires_grad_(), weight.requires_grad_(), rule)

    value, hidden, weight = exact(
        (joined(own, bias), joined(other, bias.flip(0)), labels), loss, 2.0, 3.0
    )
    found = fused((student, teacher, labels), loss, 2.0, 3.0, 8)
    assert student.bias is not None
    assert student.bias.grad is not None
    assert error(found[0], value) < 1e-12
    assert error(found[1], hidden[:, :-1]) < 1e-12
    assert error(found[2], weight[:, :-1]) < 1e-12
    assert error(student.bias.grad, weight[:, -1]) < 1e-12
    torch.testing.assert_close(student.logits(), joined(own, bias).logits())


@pytest.mark.parametrize("padded", ["student", "teacher", "both"])
@pytest.mark.parametrize("loss", [None, *LOSSES])
def test_rows_that_are_no_tokens_get_no_probability(loss: str | None, padded: str) -> None:
    """Neither where a head says how many are tokens, nor where the other head has fewer rows."""
    expected = fused(inputs(37, 16, 507, 123), loss, 1.0, 2.0, 8)
    student, teacher, labels = inputs(37, 16, 507, 123)

    def with_rows(x: DeferredLogits, rows: int, tokens: int | None) -> DeferredLogits:
        likely = x.hidden.detach().mean(0).expand(rows, -1) * 100
        weight = torch.cat([x.weight.detach(), likely]).requires_grad_(x.weight.requires_grad)
        return replace(x, weight=weight, tokens=tokens)

    if padded != "teacher":
        only = 507 if padded == "both" or loss is None else None
        student = with_rows(student, 5, only)
    if padded != "student":
        teacher = with_rows(teacher, 9, 507 if padded == "both" else None)
    found = fused((student, teacher, labels), loss, 1.0, 2.0, 8)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[2][:507], expected[2])
    assert not found[2][507:].any()


def test_a_compiled_caller_gets_the_same() -> None:
    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return fused_cross_entropy(DeferredLogits(2 * hidden, weight), labels, chunk=4)

    student, _, labels = inputs(10, 8, 21, 5)
    compiled = torch.compile(loss, backend="eager")
    for a, b in zip(
        torch.autograd.grad(compiled(student.hidden, student.weight, labels), student.hidden),
        torch.autograd.grad(loss(student.hidden, student.weight, labels), student.hidden),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("loss", LOSSES)
def test_fp64_inputs_are_computed_in_fp64(loss: str) -> None:
    made = [inputs(9, 8, 21, 5, dtype=torch.float64) for _ in range(2)]
    expected = exact(made[0], loss, 2.0, 1.0)
    for a, b in zip(fused(made[1], loss, 2.0, 1.0, 4), expected, strict=True):
        assert error(a, b) < 1e-12


@pytest.mark.parametrize("rule", RULES)
def test_the_teacher_against_itself_is_exactly_zero(rule: str) -> None:
    student, _, labels = inputs(40, 32, 507, 32, mask="all", rule=RULES[rule])
    loss = fused_divergence(student, student.detach(), labels, chunk=16)
    loss.backward()
    assert loss.item() == 0.0
    assert student.hidden.grad is not None
    assert float(student.hidden.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("loss", [None, *LOSSES])
def test_no_valid_position_gives_no_loss_and_zero_gradients(loss: str | None) -> None:
    value, grad_hidden, grad_weight = fused(inputs(6, 8, 21, 5, mask="none"), loss, 1.0, 1.0, 4)
    assert value.item() == 0.0
    assert not grad_hidden.any()
    assert not grad_weight.any()


def test_a_factor_after_the_loss_scales_the_gradients_every_time() -> None:
    once = fused(inputs(10, 8, 21, 5), "forward_kl", 1.0, 1.0, 4)
    student, teacher, labels = inputs(10, 8, 21, 5)
    loss = fused_divergence(student, teacher, labels, chunk=4)
    (3 * loss).backward(retain_graph=True)
    assert student.weight.grad is not None
    torch.testing.assert_close(student.weight.grad, 3 * once[2])
    (2 * loss).backward()
    torch.testing.assert_close(student.weight.grad, 5 * once[2])


def test_frozen_inputs_get_no_gradient_and_evaluation_makes_none() -> None:
    student, _, labels = inputs(10, 8, 21, 5)
    student.weight.requires_grad_(False)
    fused_cross_entropy(student, labels).backward()
    assert student.hidden.grad is not None
    assert student.weight.grad is None
    with torch.no_grad():
        loss = fused_cross_entropy(student, labels)
    assert not loss.requires_grad
    assert error(loss, exact(inputs(10, 8, 21, 5), None, 1.0, 1.0)[0]) < 1e-6


def test_autocast_does_not_reach_inside() -> None:
    plain = fused(inputs(10, 8, 21, 5), "forward_kl", 1.0, 1.0, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = fused(inputs(10, 8, 21, 5), "forward_kl", 1.0, 1.0, 4)
    for a, b in zip(plain, cast, strict=True):
        assert torch.equal(a, b)


def test_leading_dimensions_are_free() -> None:
    (flat, _, labels), (deep, _, _) = inputs(12, 8, 21, 5), inputs(12, 8, 21, 5)
    expected = fused_cross_entropy(flat, labels)
    folded = DeferredLogits(deep.hidden.view(3, 4, 8), deep.weight)
    found = fused_cross_entropy(folded, labels.view(3, 4), chunk=5)
    assert abs(found.item() - expected.item()) < 1e-6


_MEMORY = """
import sys, torch
from paretron.distill.fused import DeferredLogits, fused_divergence
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

student, teacher = DeferredLogits(h, w), DeferredLogits(th, tw)
labels = torch.zeros(1024, dtype=torch.int64)
fused = peak(lambda: fused_divergence(student, teacher, labels, chunk=128).backward())
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
