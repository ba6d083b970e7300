"""Index arithmetic of table rows: nested axes, dependent axes, fused segments."""

from __future__ import annotations

import pytest
import torch

from paretron.families import Tensor
from paretron.surgery.slicing import dim_index, segment_index, slice_tensor, take

SIZES = {"a": 3, "b": 4, "c": 2, "hidden": 6}


def _dim(text: str) -> tuple[tuple[str, ...], ...]:
    (dim,) = Tensor("x", text).dims
    return dim


def test_nothing_pruned_is_none() -> None:
    assert dim_index(_dim("a*b"), sizes=SIZES, kept={"c": torch.tensor([1])}) is None
    assert dim_index(_dim("a*b"), sizes=SIZES, kept={"a": torch.arange(3)}) is None


def test_a_range_is_a_slice() -> None:
    assert dim_index(_dim("b"), sizes=SIZES, kept={"b": torch.tensor([1, 2])}) == slice(1, 3)
    assert dim_index(_dim("a*b"), sizes=SIZES, kept={"a": torch.tensor([2])}) == slice(8, 12)


def test_nested_axes() -> None:
    kept = {"a": torch.tensor([0, 2]), "b": torch.tensor([1, 3])}
    grid = torch.arange(24).view(3, 4, 2)
    expected = grid[[0, 2]][:, [1, 3]].flatten()
    assert torch.equal(segment_index(("a", "b", "c"), sizes=SIZES, kept=kept), expected)


def test_units_that_depend_on_the_unit_before() -> None:
    kept = {"a": torch.tensor([0, 2]), "b": torch.tensor([[3, 1], [0, 2]])}
    grid = torch.arange(24).view(3, 4, 2)
    expected = torch.stack((grid[0, [3, 1]], grid[2, [0, 2]])).flatten()
    assert torch.equal(segment_index(("a", "b", "c"), sizes=SIZES, kept=kept), expected)


def test_segments_follow_each_other() -> None:
    kept = {"b": torch.tensor([0, 3])}
    index = dim_index(_dim("a*b|b|c"), sizes=SIZES, kept=kept)
    expected = [0, 3, 4, 7, 8, 11, 12, 15, 16, 17]
    assert isinstance(index, torch.Tensor)
    assert index.tolist() == expected


def test_a_number_is_a_factor_of_its_own() -> None:
    index = dim_index(_dim("2*b"), sizes=SIZES, kept={"b": torch.tensor([1])})
    assert isinstance(index, torch.Tensor)
    assert index.tolist() == [1, 5]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
)
@pytest.mark.parametrize("dim", [0, 1])
def test_take_moves_bits(dtype: torch.dtype, dim: int) -> None:
    tensor = torch.randn(6, 5).to(dtype)
    index = torch.tensor([4, 0, 2])
    expected = tensor.float().index_select(dim, index)
    found = take(tensor, dim, index)
    assert found.dtype == dtype
    assert torch.equal(found.float(), expected)
    assert torch.equal(take(tensor, dim, slice(1, 3)).float(), tensor.float().narrow(dim, 1, 2))
    assert take(tensor, dim, None) is tensor


def test_columns_of_a_view_of_rows() -> None:
    row = Tensor("x", "hidden, b")
    tensor = torch.randn(6, 4)
    kept = {"hidden": torch.tensor([2, 3, 4]), "b": torch.tensor([3, 0])}
    found = slice_tensor(tensor, row, sizes=SIZES, kept=kept)
    assert torch.equal(found, tensor[2:5][:, [3, 0]])
