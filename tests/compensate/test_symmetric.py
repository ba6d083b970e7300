"""Half of a symmetric matrix, in blocks: the same as the whole one in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paretron.compensate.symmetric import Symmetric


def _random(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 5), st.integers(0, 99))
def test_sums_factors_and_solves_as_the_whole_matrix_does(
    size: int, block: int, rows: int, seed: int
) -> None:
    a, right = _random(size + 10, size, seed), _random(rows, size, seed + 1)
    half = Symmetric(size, block=block)
    half.add(a[:7])
    half.add(a[7:])
    whole = a.T @ a
    torch.testing.assert_close(half.dense(), whole, rtol=1e-12, atol=1e-12)
    assert half.mean_diagonal() == pytest.approx(float(whole.diagonal().mean()))
    for part in half.diagonals:
        part += 0.1
    whole += 0.1 * torch.eye(size, dtype=torch.float64)
    expected = torch.linalg.solve(whole, right.T).T
    half.factor()
    half.solve(right)
    torch.testing.assert_close(right, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("block", [4, 16])
def test_fewer_tokens_than_inputs_and_no_ridge_end_in_a_fit_all_the_same(block: int) -> None:
    a, y = _random(6, 16, 0), _random(6, 3, 1)
    half = Symmetric(16, block=block)
    half.add(a)
    weight = y.T @ a
    half.factor()
    half.solve(weight)
    assert float((a @ weight.T - y).abs().max()) < 1e-3


def test_sums_that_are_no_numbers_are_refused() -> None:
    half = Symmetric(4)
    half.add(torch.full((3, 4), torch.nan, dtype=torch.float64))
    with pytest.raises(ValueError, match="NaN"):
        half.factor()
