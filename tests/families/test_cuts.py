"""How the table says that a model is cut: whole rows and columns, and families that cannot be."""

from __future__ import annotations

from typing import Any

import pytest

from paretron.errors import Code
from paretron.families import FAMILIES, expected_tensors, family_of, sizes
from paretron.families.cuts import cut_problems, module_cuts
from pico import MOE_FAMILIES, PICO_FAMILIES, pico_model

NOT_CUT = {"phi3", "olmo2", *MOE_FAMILIES}


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    return dict(pico_model(family, num_hidden_layers=2, **changes).config.to_dict())


@pytest.mark.parametrize("name", sorted({*PICO_FAMILIES} - NOT_CUT))
def test_every_product_is_cut_once(name: str) -> None:
    """What writes heads or neurons keeps rows, what reads them columns; norms are whole."""
    config = config_of(name)
    family = family_of(config)
    assert not cut_problems(family, config, degree=2, where="here")
    size, cuts = sizes(family, config), module_cuts(family, config)
    widths = {size["kv_heads"] * size["head_dim"] * n for n in (1, size["q_per_kv"])}
    for tensor, shape in expected_tensors(family, config).items():
        module, _, kind = tensor.rpartition(".")
        if kind != "weight":
            continue
        if shape == (size["head_dim"],):
            expected = "whole, of some heads"
        elif len(shape) == 1:
            expected = "whole"
        else:  # no pico has a hidden size that is also one of what is cut
            cut = widths | {size["ffn"], size["vocab"]} - {size["hidden"]}
            expected = "rows" if shape[0] in cut and shape[1] == size["hidden"] else "columns"
            assert shape[0 if expected == "rows" else 1] in cut
        assert cuts[module] == expected, tensor


@pytest.mark.parametrize("name", sorted(NOT_CUT))
def test_families_whose_matrices_are_not_cut_are_refused(name: str) -> None:
    config = config_of(name)
    problems = cut_problems(family_of(config), config, degree=2, where="here")
    assert problems
    assert {p.code for p in problems} == {Code.UNSUPPORTED}


def test_sizes_that_do_not_divide_are_named_all_at_once() -> None:
    config = config_of("mistral", num_attention_heads=12, num_key_value_heads=6, vocab_size=324)
    family = family_of(config)
    problems = cut_problems(family, config, degree=5, where="here")
    assert [p.cause.split(" do")[0] for p in problems] == [
        "6 key-value heads (kv_heads)", "96 MLP neurons (ffn)", "324 rows of the vocabulary (vocab)"
    ]  # fmt: skip
    assert all(p.fix.startswith("tensor_parallel: 1 or 2") for p in problems)
    assert not cut_problems(family, config, degree=6, where="here")


def test_every_family_is_known_to_be_cut_or_not() -> None:
    assert {*PICO_FAMILIES, *MOE_FAMILIES} == {*FAMILIES}
