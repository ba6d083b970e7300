"""One orthonormal basis for the residual stream of a whole model: its principal components."""

from __future__ import annotations

import math

import torch


def covariance_sum(stream_ND: torch.Tensor, *, norm: str) -> torch.Tensor:
    """The sum over tokens of x x^T for the stream as a norm sees it, fp64 [D, D].

    RMSNorm: x / rms(x). LayerNorm: the mean over channels is taken off first.
    """
    x = stream_ND.double()
    if norm == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    square = x.square().mean(-1, keepdim=True)
    x = x * square.clamp(min=torch.finfo(torch.float32).tiny).rsqrt()
    return x.T @ x


def principal_basis(
    covariance_DD: torch.Tensor, count: int, *, norm: str, spread_seed: int | None = None
) -> tuple[torch.Tensor, float]:
    """Rows B [count, D] that are orthonormal, and the share of the energy that they keep.

    The stream becomes B x. For LayerNorm one of the directions is that of the mean over channels:
    it becomes the mean over the new channels, so that both norms take off the same. With a seed the
    kept directions are spread over all new channels by an orthogonal map with random signs.
    """
    size = len(covariance_DD)
    if norm == "rms":
        values, vectors = torch.linalg.eigh(covariance_DD)
        basis = _signed(vectors.flip(1)[:, :count].T)
        kept = float(values.flip(0)[:count].sum() / values.sum())
        return (basis if spread_seed is None else spreading(count, spread_seed) @ basis), kept
    # The covariance has no part along the mean; lifting it there makes it the first component.
    mean = torch.full((size,), size**-0.5, dtype=torch.float64)
    lift = 2 * covariance_DD.diagonal().sum() + 1
    values, vectors = torch.linalg.eigh(covariance_DD + lift * torch.outer(mean, mean))
    others = _signed(vectors.flip(1)[:, 1:count].T)  # [count - 1, D], orthogonal to the mean
    kept = float(values.flip(0)[1:count].sum() / values[:-1].sum())
    if spread_seed is not None and count > 1:
        others = spreading(count - 1, spread_seed) @ others
    cosines = _cosines(count)  # the first row is constant
    return torch.outer(cosines[0], mean) + cosines[1:].T @ others, kept


def spreading(size: int, seed: int) -> torch.Tensor:
    """An orthogonal matrix whose entries all have about the same size, for any `size`.

    Cosines take the place of a Hadamard matrix, which few sizes have; signs are drawn by seed.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size,), generator=generator, dtype=torch.int64) * 2 - 1
    return _cosines(size) * signs.double()


def _cosines(size: int) -> torch.Tensor:
    """The orthonormal cosine transform (DCT-II), [size, size] in fp64."""
    k = torch.arange(size, dtype=torch.float64)
    rows = torch.cos(math.pi / size * torch.outer(k, k + 0.5)) * math.sqrt(2 / size)
    rows[0] *= math.sqrt(0.5)
    return rows


def _signed(rows: torch.Tensor) -> torch.Tensor:
    """The same directions, each with its largest entry positive: a library may return either."""
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return rows * largest.sign()
