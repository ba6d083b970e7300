"""Records of the likeliest tokens: small for every vocabulary, exact ids, bounded errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paretron.distill.capture.codec import TopTokensCodec
from paretron.distill.divergences import TopKForwardKL, WithLabels
from paretron.distill.fused import DeferredLogits, fused_divergence
from paretron.distill.losses import cross_entropy, top_k_forward_kl
from paretron.distill.top import TopTokens


@pytest.mark.parametrize(
    ("vocab_size", "expected"),
    [(1000, 210), (32000, 210), (128256, 210), (151936, 207), (262144, 210), (1 << 20, 210)],
)
def test_a_token_takes_at_most_210_bytes_at_64(vocab_size: int, expected: int) -> None:
    codec = TopTokensCodec(vocab_size, 64)
    assert codec.record_bytes == expected
    top = TopTokens.of(torch.randn(3, vocab_size), k=64, temperature=1.0)
    assert codec.encode(top).shape == (3, expected)


@settings(deadline=None, max_examples=60)
@given(
    vocab_size=st.integers(3, 5000),
    share=st.floats(0, 1),
    spread=st.sampled_from([0.01, 1.0, 4.0, 40.0]),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    seed=st.integers(0, 2**31),
)
def test_ids_come_back_exactly_and_probabilities_within_the_bound(
    vocab_size: int, share: float, spread: float, temperature: float, seed: int
) -> None:
    k = 1 + round(share * (min(vocab_size, 300) - 2))
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(5, vocab_size, generator=generator)
    top = TopTokens.of(logits, k=k, temperature=temperature)
    codec = TopTokensCodec(vocab_size, k, temperature)
    back = codec.decode(codec.encode(top))
    ids, order = top.ids.sort(dim=1)
    assert torch.equal(back.ids, ids)
    mass = back.log_probabilities.exp().sum(1) + back.log_rest.exp().squeeze(1)
    assert float((mass - 1).abs().max()) < 1e-5
    wanted = top.log_probabilities.gather(1, order)
    odds = top.log_rest - top.log_probabilities.logsumexp(1, keepdim=True)
    inside = (wanted - wanted.amax(1, keepdim=True) > -20) & (odds > -20)
    error = (back.log_probabilities - wanted).abs()[inside.expand_as(wanted)]
    assert not len(error) or float(error.max()) <= codec.error
    # What fp32 misses of a mass of 1 would count in full in a sum of small differences.
    p = torch.cat([wanted, top.log_rest], dim=1).double().log_softmax(1)
    q = torch.cat([back.log_probabilities, back.log_rest], dim=1).double().log_softmax(1)
    kl = float((q.exp() * (q - p)).nan_to_num().sum(1).max())
    if bool(inside.all()):  # nothing lies below the range
        assert kl <= codec.error**2 * math.exp(codec.error) / 2 + 1e-6


def test_a_bitmap_that_lost_a_bit_is_refused() -> None:
    codec = TopTokensCodec(500, 20)
    records = codec.encode(TopTokens.of(torch.randn(2, 500), k=20, temperature=1.0))
    records[1, 20 * codec.entry_bytes :] = 0
    with pytest.raises(ValueError, match="k ids"):
        codec.decode(records)


@pytest.mark.parametrize("labels_weight", [0.0, 0.5])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("k", [1, 16, 250])
def test_the_loss_of_what_was_kept_is_the_formula(
    k: int, temperature: float, labels_weight: float
) -> None:
    torch.manual_seed(k)
    tokens = 251
    hidden = torch.randn(4, 9, 12, requires_grad=True)
    weight = torch.randn(tokens, 12, requires_grad=True)
    teacher = 3 * torch.randn(4, 9, tokens)
    labels = torch.randint(0, tokens, (4, 9))
    labels[:, -1] = -100
    loss = TopKForwardKL(k, temperature)
    divergence = WithLabels(loss, labels_weight) if labels_weight else loss
    top = TopTokens.of(teacher, k=k, temperature=temperature)
    found = fused_divergence(
        DeferredLogits(hidden, weight), top, labels, divergence=divergence, chunk=5
    )
    grads = torch.autograd.grad(found, (hidden, weight))

    logits = (hidden @ weight.t())[labels != -100]
    wanted = top_k_forward_kl(logits, teacher[labels != -100], k=k, temperature=temperature)
    wanted = wanted + labels_weight * cross_entropy(logits, labels[labels != -100])
    expected = torch.autograd.grad(wanted, (hidden, weight))
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-4)
    for mine, its in zip(grads, expected, strict=True):
        assert float((mine - its).abs().max()) <= 1e-4 * float(its.abs().max())


def test_the_loss_on_labels_is_exact_where_they_are_among_the_kept() -> None:
    logits = 2 * torch.randn(40, 100, generator=torch.Generator().manual_seed(0))
    top = TopTokens.of(logits, k=99, temperature=1.0)
    labels = torch.arange(40)
    wanted = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    assert torch.allclose(top.label_losses(labels), wanted, atol=1e-4)
