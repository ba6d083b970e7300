"""Every loss that a recipe can name, in closed form and as its plain formula."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from paretron.distill import losses
from paretron.distill.divergences import (
    Cosine,
    Divergence,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SquaredError,
    TopKForwardKL,
    WeightedSoftLabels,
    WithLabels,
)

Plain = Callable[[Tensor, Tensor, Tensor, float], Tensor]  # student, teacher, labels, temperature


def _unlabelled(loss: Callable[..., Tensor]) -> Plain:
    return lambda s, t, labels, tau: loss(s, t, valid=labels != losses.IGNORE, temperature=tau)


def _wsl_kd(s: Tensor, t: Tensor, labels: Tensor, tau: float) -> Tensor:
    return losses.weighted_soft_labels(s, t, labels, temperature=tau)


def _mixed(s: Tensor, t: Tensor, labels: Tensor, tau: float) -> Tensor:
    divergence = losses.reverse_kl(s, t, valid=labels != losses.IGNORE, temperature=tau)
    return divergence + 0.3 * losses.cross_entropy(s, labels)


LOSSES: dict[str, tuple[Callable[[float], Divergence], Plain]] = {
    "forward_kl": (ForwardKL, _unlabelled(losses.forward_kl)),
    "reverse_kl": (ReverseKL, _unlabelled(losses.reverse_kl)),
    "jsd": (JensenShannon, _unlabelled(losses.jensen_shannon)),
    "mse": (SquaredError, _unlabelled(losses.squared_error)),
    "cosine": (Cosine, _unlabelled(losses.cosine)),
    "wsl_kd": (WeightedSoftLabels, _wsl_kd),
    "top_k": (partial(TopKForwardKL, 3), _unlabelled(partial(losses.top_k_forward_kl, k=3))),
    "with_labels": (lambda tau: WithLabels(ReverseKL(tau), 0.3), _mixed),
}
