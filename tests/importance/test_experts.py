"""Experts and their neurons observed while they run: nothing is run twice, nothing stored dense."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from makers import PicoMaker
from paretron.artifacts.models import load_model
from paretron.artifacts.reader import Checkpoint
from paretron.errors import Code, ParetronError
from paretron.families import FAMILIES
from paretron.importance.collect import Observed, batches_of, observe
from paretron.importance.executor import LayerStack
from paretron.importance.experts import run_experts
from paretron.importance.statistics import AGGREGATIONS, Aggregation, aggregate, over_positions
from paretron.importance.stream import StreamedStack
from paretron.importance.taps import find_taps
from pico import MOE_FAMILIES, pico_model

LENGTHS = (33, 7, 50, 1, 40)


def _windows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 320, (n,), generator=generator) for n in LENGTHS]


def _observe(model: PreTrainedModel, micro_batch: int) -> Observed:
    family = FAMILIES[model.config.model_type]
    config = model.config.to_dict()
    return observe(LayerStack(model, family), config, batches_of(_windows(), micro_batch))


def _over(how: Aggregation) -> Callable[[torch.Tensor], torch.Tensor]:
    return {
        "mean": lambda x: x.abs().mean(0),
        "l2": lambda x: x.square().sum(0).sqrt(),
        "var": lambda x: (x - x.mean(0)).square().mean(0),
    }[how]


def _dense(experts: Any, args: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """By every expert for every token: what each adds [T, E], and its neurons [T, E, moe_ffn]."""
    hidden, chosen, weights = args
    added, neurons = [], []
    for e in range(len(experts.down_proj)):
        weight = (weights * (chosen == e)).sum(-1)
        gate, up = linear(hidden, experts.gate_up_proj[e]).chunk(2, dim=-1)
        inner = experts.act_fn(gate) * up
        added.append(linear(inner, experts.down_proj[e]).norm(dim=-1) * weight)
        neurons.append(inner.abs() * (weight > 0)[:, None])
    return torch.stack(added, 1).double(), torch.stack(neurons, 1).double()


def _reference(model: PreTrainedModel) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """What each layer's experts add, and their neurons, one unpadded sample at a time."""
    layers = [m for n, m in model.named_modules() if n.endswith("mlp.experts")]
    seen: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = [([], []) for _ in layers]
    hooks = []
    for k, module in enumerate(layers):

        def keep(module: nn.Module, args: tuple[torch.Tensor, ...], k: int = k) -> None:
            added, neurons = _dense(module, args)
            seen[k][0].append(added)
            seen[k][1].append(neurons)

        hooks.append(module.register_forward_pre_hook(keep))
    with torch.no_grad():
        for window in _windows():
            model(window[None])
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("micro_batch", [1, 3])
@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_nine_aggregations_equal_a_reference_that_keeps_zeros(
    family: str, micro_batch: int
) -> None:
    model = pico_model(family, num_hidden_layers=3).double()
    reference = _reference(model)
    observed = _observe(model, micro_batch)
    moe_layers = len(reference)
    assert moe_layers == (3 if family == "mixtral" else 2)
    for batch, sequence in itertools.product(AGGREGATIONS, AGGREGATIONS):

        def score(seen: list[torch.Tensor], b: Aggregation, s: Aggregation) -> torch.Tensor:
            return _over(b)(torch.stack([_over(s)(x) for x in seen]))

        for axis, which in (("experts", 0), ("moe_ffn", 1)):
            expected = torch.stack([score(layer[which], batch, sequence) for layer in reference])
            found = aggregate(observed.axes[axis], batch=batch, sequence=sequence)
            assert torch.allclose(
                found.view_as(expected), expected, rtol=1e-6, atol=1e-6 * float(expected.max())
            ), (axis, batch, sequence)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_taps(family: str) -> None:
    config = pico_model(family).config.to_dict()
    taps = find_taps(FAMILIES[family], config)
    layers = (0, 1, 2, 3) if family == "mixtral" else (0, 2, 3)
    names = {a: [t.name for t in taps if t.axis == a] for a in {t.axis for t in taps}}
    assert names["experts"] == [f"model.layers.{i}.mlp.experts" for i in layers]
    assert names["moe_ffn"] == [
        f"model.layers.{i}.mlp.experts.{e}" for i in layers for e in range(4)
    ]
    assert {(t.axis, t.units) for t in taps if t.side == "experts"} == {
        ("experts", 4), ("moe_ffn", 48),
    }  # fmt: skip
    dense = ["model.layers.1.mlp.down_proj"] if family == "qwen3_moe" else None
    assert names.get("ffn") == dense


def test_output_is_that_of_the_library_and_its_own_forward_comes_back() -> None:
    model = pico_model("mixtral")
    experts = model.model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(40, 64, generator=generator)
    _, weights, chosen = model.model.layers[0].mlp.gate(hidden)
    with torch.no_grad():
        found, seen = run_experts(experts, hidden, chosen, weights)
        torch.testing.assert_close(found, experts(hidden, chosen, weights))
    assert [len(n) for n in seen.neurons] == seen.routed_EN.sum(1).tolist()
    assert sum(len(n) for n in seen.neurons) == 2 * len(hidden)
    _observe(model, 2)
    assert all("forward" not in vars(module) for module in model.modules())


def test_an_expert_that_no_token_is_routed_to_scores_zero() -> None:
    model = pico_model("mixtral", num_hidden_layers=2)
    gate = model.model.layers[1].mlp.gate

    def never_the_second(
        module: nn.Module, args: tuple[torch.Tensor], out: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        logits = out[0].clone()
        logits[:, 2] = float("-inf")
        chosen, experts = logits.softmax(-1).topk(2, dim=-1)
        return logits, chosen / chosen.sum(-1, keepdim=True), experts

    gate.register_forward_hook(never_the_second)
    observed = _observe(model, 2)
    assert observed.axes["experts"].samples == observed.axes["moe_ffn"].samples == len(LENGTHS)
    added = aggregate(observed.axes["experts"], batch="l2", sequence="mean")
    neurons = aggregate(observed.axes["moe_ffn"], batch="l2", sequence="mean").view(2, 4, 48)
    assert added[1].gt(0).tolist() == [True, True, False, True]
    assert neurons[1].gt(0).any(-1).tolist() == [True, True, False, True]
    assert added[0].gt(0).all()


def test_nan_inside_an_expert_is_named() -> None:
    model = pico_model("mixtral")
    with torch.no_grad():
        model.model.layers[2].mlp.experts.gate_up_proj[1] = float("nan")
    with pytest.raises(ParetronError) as caught:
        _observe(model, 2)
    assert caught.value.problems[0].code is Code.GATE_NONFINITE
    assert caught.value.problems[0].where == "model.layers.2.mlp.experts"


@pytest.mark.parametrize("rows", [0, 1, 5, 70])
@pytest.mark.parametrize("zeros", [0, 1, 33])
def test_zeros_count_as_if_they_were_there(rows: int, zeros: int) -> None:
    if not rows + zeros:
        return
    values = torch.rand(rows, 9, generator=torch.Generator().manual_seed(rows), dtype=torch.float64)
    whole = torch.cat((values, torch.zeros(zeros, 9, dtype=torch.float64)))
    found = over_positions(values, zeros=zeros)
    for k, how in enumerate(AGGREGATIONS):
        torch.testing.assert_close(found[k], _over(how)(whole), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_layers_streamed_from_disk_give_the_same_sums(pico: PicoMaker, family: str) -> None:
    checkpoint = Checkpoint.open(pico(family))
    stack = StreamedStack(checkpoint, dtype=torch.float32, device=torch.device("cpu"))
    streamed = observe(stack, checkpoint.config, batches_of(_windows(), 2))
    resident = _observe(load_model(checkpoint.path), 2)
    for axis in ("experts", "moe_ffn"):
        assert torch.equal(streamed.axes[axis].sums, resident.axes[axis].sums)
