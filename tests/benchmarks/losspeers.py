"""Forward KL between two linear heads as three codes have it: ours, plain PyTorch, Liger-Kernel.

Liger's chunked losses are pure PyTorch; its JSD with beta 0 is the forward KL, its other terms are
switched off.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec

import torch
from torch import Tensor

from paretron.distill.fused import DeferredLogits, fused_divergence
from paretron.distill.losses import forward_kl

# hidden [N, d], weight [V, d], the teacher's hidden [N, e] and weight [V, e] -> the mean loss
HeadLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def plain(hidden: Tensor, weight: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
    """The reference: both models' logits at once."""
    return forward_kl(hidden @ weight.t(), teacher @ head.t()) / len(hidden)


def fused(hidden: Tensor, weight: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
    """The loss that never holds them."""
    student, other = DeferredLogits(hidden, weight), DeferredLogits(teacher, head)
    labels = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
    return fused_divergence(student, other, labels, normaliser=len(hidden))


def liger(*, compiled: bool) -> HeadLoss:
    """Liger-Kernel's."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=compiled
    )

    def call(hidden: Tensor, weight: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
        labels = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        result: Tensor = loss(hidden, weight, teacher, head, labels)
        return result

    return call


def peers() -> dict[str, Callable[[], HeadLoss]]:
    """Every code that is installed, by name."""
    found: dict[str, Callable[[], HeadLoss]] = {"plain": lambda: plain, "fused": lambda: fused}
    if find_spec("liger_kernel") is not None:
        found["liger"] = lambda: liger(compiled=True)
        found["liger_eager"] = lambda: liger(compiled=False)
    return found


def versions() -> dict[str, str]:
    """What was compared."""
    names = ["torch", *(["liger-kernel"] if find_spec("liger_kernel") is not None else [])]
    return {name: version(name) for name in names}


def drawn(
    tokens: int, student: int, teacher: int, vocab: int, *, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and heads whose logits spread by about 3, as a language model's do."""
    random = torch.Generator(device).manual_seed(0)

    def draw(rows: int, size: int, scale: float) -> Tensor:
        values = torch.randn(rows, size, generator=random, device=device, dtype=dtype)
        return values.mul_(scale)

    return (
        draw(tokens, student, 1.0).requires_grad_(),
        draw(vocab, student, 3 * student**-0.5).requires_grad_(),
        draw(tokens, teacher, 1.0),
        draw(vocab, teacher, 3 * teacher**-0.5),
    )


def gradient_errors(inputs: tuple[Tensor, Tensor, Tensor, Tensor], loss: HeadLoss) -> list[float]:
    """Of hidden states and weight: |gradient - fp64's| / |fp64's| for the same input numbers."""
    exact = [x.detach().double() for x in inputs]
    wanted = torch.autograd.grad(
        plain(*(x.requires_grad_(i < 2) for i, x in enumerate(exact))), exact[:2]
    )
    found = torch.autograd.grad(loss(*inputs), inputs[:2])
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]
