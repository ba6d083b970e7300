"""The nine aggregations against a reference that keeps every activation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from transformers import PreTrainedModel

from paretron.families import FAMILIES
from paretron.importance.collect import Observed, batches_of, documents_apart, observe
from paretron.importance.executor import LayerStack
from paretron.importance.statistics import (
    AGGREGATIONS,
    Aggregation,
    AxisStatistics,
    aggregate,
    over_positions,
)
from pico import PICO_FAMILIES, pico_model

LENGTHS = (33, 64, 7, 50, 1, 40)
NINE = list(itertools.product(AGGREGATIONS, AGGREGATIONS))


def _windows(seed: int = 0, vocab: int = 320) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (n,), generator=generator) for n in LENGTHS]


def _over(how: Aggregation) -> Callable[[torch.Tensor], torch.Tensor]:
    """The paper's formula over the first dimension, in the precision of its input."""
    return {
        "mean": lambda x: x.abs().mean(0),
        "l2": lambda x: x.square().sum(0).sqrt(),
        "var": lambda x: (x - x.mean(0)).square().mean(0),
    }[how]


def _reference(
    model: PreTrainedModel,
    windows: Sequence[torch.Tensor],
    batch: Aggregation,
    sequence: Aggregation,
) -> dict[str, torch.Tensor]:
    """Scores by hooks that keep everything, one unpadded sample at a time."""
    seen: dict[str, list[torch.Tensor]] = {}
    heads = model.config.num_attention_heads

    def keep(name: str, activation: torch.Tensor) -> None:
        seen.setdefault(name, []).append(activation[0].double())

    hooks = []
    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj", "c_proj")):
            hooks.append(module.register_forward_pre_hook(lambda _m, a, n=name: keep(n, a[0])))
        elif name.endswith(("layernorm", "model.norm")):
            hooks.append(module.register_forward_hook(lambda _m, _a, out, n=name: keep(n, out)))
    with torch.no_grad():
        for window in windows:
            model(window[None])
    for hook in hooks:
        hook.remove()

    def score(activations: list[torch.Tensor]) -> torch.Tensor:
        return _over(batch)(torch.stack([_over(sequence)(a) for a in activations]))

    def rows(
        suffix: str | tuple[str, ...], unit: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        names = [n for n in seen if n.endswith(suffix)]
        return torch.stack([score([unit(a) for a in seen[n]]) for n in names])

    norms = torch.cat((rows("layernorm", torch.abs), rows("model.norm", torch.abs)))
    return {
        "heads": rows("o_proj", lambda a: a.unflatten(-1, (heads, -1)).norm(dim=-1)),
        "ffn": rows(("down_proj", "c_proj"), torch.abs),
        "hidden": norms.sum(0, keepdim=True),
    }


def _observe(model: PreTrainedModel, windows: Sequence[torch.Tensor], micro_batch: int) -> Observed:
    family = FAMILIES[model.config.model_type]
    config = model.config.to_dict()
    return observe(LayerStack(model, family), config, batches_of(windows, micro_batch))


@pytest.mark.parametrize("family", PICO_FAMILIES)
def test_nine_aggregations_equal_reference_with_ragged_batches(family: str) -> None:
    model = pico_model(family, num_hidden_layers=2).double()
    windows = _windows()
    observed = _observe(model, windows, micro_batch=4)
    for batch, sequence in NINE:
        reference = _reference(model, windows, batch, sequence)
        for axis, expected in reference.items():
            found = aggregate(observed.axes[axis], batch=batch, sequence=sequence)
            found = found.sum(0, keepdim=True) if axis == "hidden" else found
            # Relative to the axis: a variance that is zero has no relative error of its own.
            bound = 1e-6 * float(expected.max())
            assert torch.allclose(found, expected, rtol=1e-6, atol=bound), (axis, batch, sequence)


def test_fp32_pass_equals_fp64_reference_on_the_same_activations() -> None:
    """The statistics themselves cost no precision when the model runs in fp32."""
    model, windows = pico_model(), _windows()
    observed = _observe(model, windows, micro_batch=1)
    for batch, sequence in NINE:
        reference = _reference(model, windows, batch, sequence)
        for axis in ("heads", "ffn"):
            found = aggregate(observed.axes[axis], batch=batch, sequence=sequence)
            bound = 1e-6 * float(reference[axis].max())
            assert torch.allclose(found, reference[axis], rtol=1e-6, atol=bound)


@pytest.mark.parametrize("micro_batch", [1, 3, 6])
def test_batch_size_and_order_do_not_matter(micro_batch: int) -> None:
    model, windows = pico_model(), _windows()
    whole = _observe(model, windows, micro_batch=2)
    other = _observe(model, windows[::-1], micro_batch=micro_batch)
    assert other.tokens == whole.tokens == sum(LENGTHS)
    for axis, statistics in whole.axes.items():
        one = aggregate(statistics, batch="l2", sequence="mean")
        two = aggregate(other.axes[axis], batch="l2", sequence="mean")
        bound = 1e-6 * float(one.max())  # the model itself rounds by the shape of its batch
        torch.testing.assert_close(two, one, rtol=1e-6, atol=bound)
        assert torch.equal(one.argsort(), two.argsort())
    torch.testing.assert_close(other.distances[1], whole.distances[1], rtol=1e-6, atol=1e-6)


def test_halves_merge_to_the_whole() -> None:
    model, windows = pico_model(), _windows()
    whole = _observe(model, windows, micro_batch=1)
    merged = _observe(model, windows[:2], 1).merged(_observe(model, windows[2:], 1))
    assert merged.tokens == whole.tokens
    for axis, statistics in whole.axes.items():
        assert merged.axes[axis].samples == statistics.samples == len(windows)
        torch.testing.assert_close(merged.axes[axis].sums, statistics.sums, rtol=1e-12, atol=0)
        for batch, sequence in NINE:
            torch.testing.assert_close(
                aggregate(merged.axes[axis], batch=batch, sequence=sequence),
                aggregate(statistics, batch=batch, sequence=sequence),
                rtol=1e-9,
                atol=1e-12,
            )
    torch.testing.assert_close(merged.distances[1], whole.distances[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("length", [1, 31, 32, 1000])
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_over_positions_is_as_exact_as_its_input(
    length: int, offset: float, dtype: torch.dtype
) -> None:
    """Also where the mean dwarfs the spread, which cancels in the usual formula."""
    generator = torch.Generator().manual_seed(length)
    scores = (torch.randn(length, 517, generator=generator).abs() + offset).to(dtype)
    mean, l2, var = over_positions(scores)
    exact = scores.double()
    torch.testing.assert_close(mean, exact.mean(0), rtol=5e-7, atol=0)
    torch.testing.assert_close(l2, exact.square().sum(0).sqrt(), rtol=5e-7, atol=0)
    torch.testing.assert_close(var, exact.var(0, correction=0), rtol=1e-6, atol=1e-12)


def test_over_positions_in_parts_equals_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.rand(203, 40)
    whole = over_positions(scores)
    monkeypatch.setattr("paretron.importance.statistics._CACHED_VALUES", 40 * 64)
    torch.testing.assert_close(over_positions(scores), whole, rtol=5e-7, atol=0)


def test_aggregate_by_hand() -> None:
    """Two samples of one unit, whose three numbers are (1, 2, 3) and (3, 5, 0)."""
    samples = torch.tensor([[1.0, 2.0, 3.0], [3.0, 5.0, 0.0]], dtype=torch.float64)
    sums, squares = samples.sum(0)[None, :, None], samples.square().sum(0)[None, :, None]
    statistics = AxisStatistics(2, sums, squares)
    by_hand = {
        ("mean", "mean"): 2.0, ("l2", "mean"): math.sqrt(10), ("var", "mean"): 1.0,
        ("mean", "l2"): 3.5, ("l2", "l2"): math.sqrt(29), ("var", "l2"): 2.25,
        ("mean", "var"): 1.5, ("l2", "var"): 3.0, ("var", "var"): 2.25,
    }  # fmt: skip
    for batch, sequence in NINE:
        found = aggregate(statistics, batch=batch, sequence=sequence)
        assert found.item() == pytest.approx(by_hand[batch, sequence], rel=1e-12)


def test_documents_apart_see_nothing_of_each_other() -> None:
    """A window over three documents gives what each of them gives alone."""
    model = pico_model(num_hidden_layers=2)
    parts = [torch.tensor([7, 8, 9, 1]), torch.tensor([1]), torch.tensor([30, 31])]
    windows = list(documents_apart([torch.cat(parts), torch.tensor([5, 1])], eos_token_id=1))
    assert [w.tolist() for w in windows] == [*(p.tolist() for p in parts), [5, 1]]
    together = _observe(model, windows[:3], micro_batch=3)
    joined = _observe(model, [torch.cat(parts)], micro_batch=1)
    alone = _observe(model, parts[:1], 1).merged(_observe(model, parts[1:], 1))
    assert together.tokens == joined.tokens == 7
    torch.testing.assert_close(together.axes["ffn"].sums, alone.axes["ffn"].sums, rtol=1e-5, atol=0)
    assert not torch.allclose(together.distances[1], joined.distances[1], rtol=1e-3)
