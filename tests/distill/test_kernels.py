"""The CUDA kernel, run by Triton's interpreter, and the half-precision products around it.

Products in bf16 and fp16 with fp32 sums are exact to emulate on a CPU: operands are rounded there
as they are on the device.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from losscases import LOSSES
from paretron.distill import fused
from paretron.distill.divergences import CrossEntropy
from paretron.distill.fused import DeferredLogits, fused_cross_entropy, fused_divergence
from paretron.distill.losses import IGNORE, cross_entropy
from paretron.families import PLAIN, LogitRule

RULES = {"plain": PLAIN, "ruled": LogitRule(divisor=7.0, softcap=20.0)}
IN_KERNEL = ("forward_kl", "reverse_kl", "jsd", "with_labels")


def heads(rule: LogitRule, *, tokens: int = 5003) -> tuple[DeferredLogits, DeferredLogits, Tensor]:
    """Peaked distributions as language models have them, bf16 operands, fp32 leaves of them."""
    random = torch.Generator().manual_seed(tokens)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=random)).bfloat16()

    weight = 3 * rule.divisor * 48**-0.5
    labels = torch.randint(tokens, (12,), generator=random)
    labels[torch.rand(12, generator=random) < 0.2] = IGNORE
    # A few hidden channels are far larger than the others, as in large models.
    hidden, other = draw(12, 48), draw(12, 64)
    hidden[:, 5] *= 900
    own = draw(tokens, 48, scale=weight)
    own[:, 5] *= 1 / 1024
    student = DeferredLogits(hidden, own, rule, draw(tokens))
    return student, DeferredLogits(other, draw(tokens, 64, scale=weight * 0.8), rule), labels


def check(loss: str, rule: str, tau: float) -> None:
    """Value and gradients within 1e-3 of fp64 in norm, as wide leaves of half-precision numbers."""
    student, teacher, labels = heads(RULES[rule])
    assert student.bias is not None
    exact = [x.double().requires_grad_() for x in (student.hidden, student.weight, student.bias)]
    own = DeferredLogits(exact[0], exact[1], student.rule, exact[2]).logits()
    wide = DeferredLogits(teacher.hidden.double(), teacher.weight.double(), teacher.rule)
    valid = [x.float().requires_grad_() for x in (student.hidden, student.weight, student.bias)]
    leaf = DeferredLogits(valid[0], valid[1], student.rule, valid[2])
    if loss == "cross_entropy":
        expected = cross_entropy(own, labels) / 9
        found = fused_cross_entropy(leaf, labels, normaliser=9.0, chunk=5)
    else:
        closed, plain = LOSSES[loss]
        expected = plain(own, wide.logits(), labels, tau) / 9
        found = fused_divergence(
            leaf, teacher, labels, divergence=closed(tau), normaliser=9.0, chunk=5
        )
    assert abs(found.item() / expected.item() - 1) < 1e-5, (loss, rule, tau)
    gradients = torch.autograd.grad(found, valid)
    for a, b in zip(gradients, torch.autograd.grad(expected, exact), strict=True):
        assert float((a.double() - b).norm() / b.norm()) < 1e-3, (loss, rule, tau)


def as_on_cuda(patch: pytest.MonkeyPatch) -> None:
    """bf16 operands for every product of fp32 leaves, as autocast has it there."""
    patch.setattr(fused, "product_dtype", lambda deferred: torch.bfloat16)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("loss", ["cross_entropy", *LOSSES])
def test_gradients_of_half_precision_operands_are_within_a_thousandth_of_fp64(
    loss: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_on_cuda(monkeypatch)
    check(loss, rule, 1.0)


def interpreted() -> None:
    """Every loss that the kernel knows, through it."""
    from paretron.distill.chunks import ChunkLoss, row_loss

    patch = pytest.MonkeyPatch()
    asked: list[bool] = []

    def kernel(loss: ChunkLoss) -> object:
        asked.append((found := row_loss(loss.divergence)) is not None)
        return found

    patch.setattr(ChunkLoss, "kernel", property(kernel))
    for narrow in (True, False):
        if narrow:
            as_on_cuda(patch)
        for rule in RULES:
            check("cross_entropy", rule, 1.0)
            for loss in IN_KERNEL:
                for tau in (1.0, 0.5 if narrow else 3.0):
                    check(loss, rule, tau)
    assert asked
    assert all(asked)
    assert row_loss(CrossEntropy()) is not None
    assert all(row_loss(LOSSES[name][0](1.0)) is None for name in set(LOSSES) - set(IN_KERNEL))
    patch.undo()


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernel_equals_the_formulas() -> None:
    """In a process of its own: the interpreter is chosen when the kernel is defined."""
    tests = Path(__file__).parents[1]
    subprocess.run(
        [sys.executable, __file__],
        check=True,
        env=os.environ
        | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(tests), "OMP_NUM_THREADS": "1"},
    )


if __name__ == "__main__":
    interpreted()
