"""Losses between two models' logits in closed form: the value, and the gradient made in place.

Each takes a block of logits [positions, vocab] of both models, fp32 or fp64, and returns the summed
loss in fp64. The student's block ends as dLoss/dLogits, the teacher's is used up. `losses` has each
formula in plain autograd, which tests hold these to.

With u = logits / tau and p = softmax(u), a loss of p has the gradient p * (g - sum(p * g)) in u,
where g = dLoss/dp. What is summed over tokens goes through a `Vocabulary`, so that processes can
share a block, each with the logits of its own tokens.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import softplus

from paretron.distill.vocabulary import WHOLE, Shard, Vocabulary
from paretron.errors import Code, ParetronError, Problem
from paretron.recipe.training import Loss


class Divergence(Protocol):
    """How far a student's block of logits is from its teacher's."""

    def __call__(
        self, student: Tensor, teacher: Tensor, labels: Tensor, *, gradient: bool
    ) -> Tensor:
        """The sum over positions; without `gradient` the student's block may hold junk after it."""


@dataclass(frozen=True)
class Distance(ABC):
    """Between the two models' softmax(logits / temperature)."""

    temperature: float = 1.0
    vocabulary: Vocabulary = WHOLE

    @abstractmethod
    def __call__(
        self, student: Tensor, teacher: Tensor, labels: Tensor, *, gradient: bool
    ) -> Tensor:
        """As `Divergence`."""

    def _log_softmax(self, block: Tensor) -> Tensor:
        """In place."""
        return _log_softmax(_cool(block, self.temperature), self.vocabulary)


@dataclass(frozen=True)
class ForwardKL(Distance):
    """`losses.forward_kl`; dLoss/du = p_s - p_t."""

    def __call__(
        self, student: Tensor, teacher: Tensor, labels: Tensor, *, gradient: bool
    ) -> Tensor:
        """Exactly zero where both blocks are the same."""
        # Both maxima are taken out first, so nothing large cancels where the two models agree.
        for block in (student, teacher):
            _cool(block, self.temperature)
            block.sub_(self.vocabulary.amax(block))
        difference = teacher - student
        z_student = self.vocabulary.sum(student.exp_())
        z_teacher = self.vocabulary.sum(teacher.exp_())
        expected = self.vocabulary.sum(difference.mul_(teacher)).div_(z_teacher)
        if gradient:
            student.div_(z_student).addcmul_(teacher, z_teacher.reciprocal(), value=-1)
            _cool(student, self.temperature)
        return _total(expected.add_(z_student.log() - z_teacher.log()))


@dataclass(frozen=True)
class ReverseKL(Distance):
    """`losses.reverse_kl`; dLoss/du = p_s (log p_s - log p_t - loss)."""

    def __call__(
        self, student: Tensor, teacher: Tensor, labels: Tensor, *, gradient: bool
    ) -> Tensor:
        """The student weighs its own distance from the teacher."""
        log_student, log_teacher = (self._log_softmax(x) for x in (student, teacher))
        distance = log_teacher.neg_().add_(log_student)
        probability = log_student.exp_()
        loss = self.vocabulary.sum(probability * distance)
        if gradient:
            _cool(probability.mul_(distance.sub_(loss)), self.temperature)
        return _total(loss)


@dataclass(frozen=True)
class JensenShannon(Distance):
    """`losses.jensen_shannon`; dLoss/du = p_s (log(p_s / m) - KL(p_s || m)) / 2."""

    def __call__(
        self, student: Tensor, teacher: Tensor, labels: Tensor, *, gradient: bool
    ) -> Tensor:
        """Symmetric in value; only the student learns."""
        log_student, log_teacher = (self._log_softmax(x) for x in (student, teacher))
        # log(p / m) straight from log p_t - log p_s, so that large logarithms never cancel.
        apart = log_teacher - log_student
        of_teacher = log_teacher.exp_().mul_(math.log(2) - softplus(-apart))
        of_teacher = self.vocabulary.sum(of_teacher)
        distance = math.log(2) - softplus(apart)
        probability = log_student.exp_()
        of_student = self.vocabulary.sum(probability * distance)
        if gradient:
            _cool(probability.mul_(distance.sub_(of_student)), 2 * self.temperature)
        return _total(of_student.add_(of_teacher).div_(2))


@dataclass(frozen=True)
class SquaredError(Distance):
    """`losses.squared_error`; dLoss/dp = 2 (p_s - p_t)."""

    def __call__(
        self, student: Tensor, teacher: Tensor, labels: Tensor, *, gradient: bool
    ) -> Tensor:
        """Between probabilities, not logits."""
        own, other = (self._log_softmax(x).exp_() for x in (student, teacher))
        difference = other.neg_().add_(own)
        loss = self.vocabulary.sum(difference.square())
        if gradient:
            mean = self.vocabulary.sum(own * difference)
            _cool(own.mul_(difference.sub_(mean)), self.temperature / 2)
        return _total(loss)


@dataclass(frozen=True)
class Cosine(Distance):
    """`losses.cosine`; dLoss/dp_s = cos * p_s / |p_s|^2 - p_t / (|p_s| |p_t|)."""

    def __call__(
        self, student: Tensor, teacher: Tensor, labels: Tensor, *, gradient: bool
    ) -> Tensor:
        """Between probabilities, not logits."""
        own, other = (self._log_softmax(x).exp_() for x in (student, teacher))
        norm, other_norm = (self.vocabulary.sum(x.square()).sqrt_() for x in (own, other))
        other.div_(other_norm.mul_(norm))
        similarity = self.vocabulary.sum(own * other)
        if gradient:
            # sum(p * g) is zero: the cosine does not change with the length of p.
            g = torch.addcmul(other.neg_(), own, similarity / norm.square())
            _cool(own.mul_(g), self.temperature)
        return _total(1 - similarity)


@dataclass(frozen=True)
class WeightedSoftLabels(Distance):
    """`losses.weighted_soft_labels`: forward KL, each position weighted without a gradient."""

    def __call__(
        self, student: Tensor, teacher: Tensor, labels: Tensor, *, gradient: bool
    ) -> Tensor:
        """`labels` [positions] are tokens, none ignored."""
        own, other = (_label_loss(x, labels, self.vocabulary) for x in (student, teacher))
        weight = -torch.expm1(-own / other)
        log_student, log_teacher = (self._log_softmax(x) for x in (student, teacher))
        difference = log_teacher - log_student
        target = log_teacher.exp_()
        loss = self.vocabulary.sum(difference.mul_(target)).mul_(weight)
        if gradient:
            _cool(log_student.exp_().sub_(target).mul_(weight), self.temperature)
        return _total(loss)


@dataclass(frozen=True)
class TopKForwardKL:
    """`losses.top_k_forward_kl`; dLoss/du = p_s - target.

    The target is p_t on the teacher's k likeliest tokens; the rest of p_t is spread over the other
    tokens as the student spreads its own.
    """

    k: int
    temperature: float = 1.0

    def __call__(
        self, student: Tensor, teacher: Tensor, labels: Tensor, *, gradient: bool
    ) -> Tensor:
        """Needs k below the vocabulary's size."""
        log_student, log_teacher = (
            _log_softmax(_cool(x, self.temperature), WHOLE) for x in (student, teacher)
        )
        target, top = log_teacher.topk(self.k, dim=1)
        own = log_student.gather(1, top)
        target_rest, own_rest = (
            x.scatter(1, top, -math.inf).logsumexp(1, keepdim=True)
            for x in (log_teacher, log_student)
        )
        probability = target.exp()
        loss = (probability * (target - own)).sum(1, keepdim=True)
        loss += target_rest.exp() * (target_rest - own_rest)
        if gradient:
            spread = (target_rest - own_rest).exp()  # p_t outside over p_s outside
            log_student.exp_().mul_(1 - spread)
            log_student.scatter_(1, top, own.exp() - probability)
            _cool(log_student, self.temperature)
        return _total(loss)


@dataclass(frozen=True)
class CrossEntropy:
    """`losses.cross_entropy`: the loss on the text's own tokens; dLoss/dLogits = p - onehot."""

    vocabulary: Vocabulary = WHOLE

    def __call__(
        self, student: Tensor, teacher: Tensor, labels: Tensor, *, gradient: bool
    ) -> Tensor:
        """Asks no teacher."""
        student.sub_(self.vocabulary.amax(student))
        chosen = self.vocabulary.chosen(student, labels)
        z = self.vocabulary.sum(student.exp_())
        if gradient:
            self.vocabulary.add_at(student.div_(z), labels, -1.0)
        return _total(z.log_().sub_(chosen))


@dataclass(frozen=True)
class WithLabels:
    """A divergence plus `weight` times the loss on the text's own tokens, at temperature 1."""

    divergence: Divergence
    weight: float
    vocabulary: Vocabulary = WHOLE

    def __call__(
        self, student: Tensor, teacher: Tensor, labels: Tensor, *, gradient: bool
    ) -> Tensor:
        """L_logits + weight * L_CLM (paper 1, section 3)."""
        log_own = _log_softmax(student.clone(), self.vocabulary)
        loss = -self.weight * _total(self.vocabulary.chosen(log_own, labels))
        total = self.divergence(student, teacher, labels, gradient=gradient) + loss
        if gradient:
            self.vocabulary.add_at(log_own.exp_(), labels, -1.0)
            student.add_(log_own, alpha=self.weight)
        return total


_BY_NAME: Mapping[str, Callable[[float], Divergence]] = {
    "forward_kl": ForwardKL,
    "reverse_kl": ReverseKL,
    "jsd": JensenShannon,
    "mse": SquaredError,
    "cosine": Cosine,
    "wsl_kd": WeightedSoftLabels,
}


def divergence_of(loss: Loss) -> Divergence:
    """The divergence that a recipe names."""
    divergence = (
        _BY_NAME[loss.logits](loss.temperature)
        if loss.top_k is None
        else TopKForwardKL(loss.top_k, loss.temperature)
    )
    return WithLabels(divergence, loss.labels) if loss.labels else divergence


def over_shard(divergence: Divergence, shard: Shard) -> Divergence:
    """The same divergence, where each process has the logits of its own tokens.

    UNSUPPORTED where the likeliest tokens would have to be found across processes.
    """
    if isinstance(divergence, WithLabels):
        return replace(
            divergence, divergence=over_shard(divergence.divergence, shard), vocabulary=shard
        )
    if isinstance(divergence, Distance | CrossEntropy):
        return replace(divergence, vocabulary=shard)
    raise ParetronError(
        Problem(
            Code.UNSUPPORTED,
            f"{type(divergence).__name__} needs every token's logit in one process",
            where="loss",
            fix="leave out top_k, or do not shard the lm_head over its vocabulary",
        )
    )


def _cool(block: Tensor, temperature: float) -> Tensor:
    return block if temperature == 1 else block.div_(temperature)


def _log_softmax(block: Tensor, vocabulary: Vocabulary) -> Tensor:
    """In place."""
    block.sub_(vocabulary.amax(block))
    return block.sub_(vocabulary.sum(block.exp()).log_())


def _label_loss(logits: Tensor, labels: Tensor, vocabulary: Vocabulary) -> Tensor:
    top = vocabulary.amax(logits)
    logsumexp = vocabulary.sum((logits - top).exp_()).log_().add_(top)
    return logsumexp.sub_(vocabulary.chosen(logits, labels))


def _total(losses: Tensor) -> Tensor:
    return losses.sum(dtype=torch.float64)
