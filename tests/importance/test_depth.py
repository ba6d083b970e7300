"""Depth: losses of removal equal those of models without the layers, at half the evaluations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from paretron.families import FAMILIES
from paretron.importance.collect import batches_of, observe
from paretron.importance.depth import Evaluator, Removals, block_removals, greedy_removal
from paretron.importance.executor import Batch, LayerStack
from paretron.importance.measures import LossMeasure
from pico import PICO_FAMILIES, pico_model

LAYERS = 6


def _stack(family: str = "llama", layers: int = LAYERS, **config: Any) -> LayerStack:
    return LayerStack(pico_model(family, num_hidden_layers=layers, **config), FAMILIES[family])


def _windows(count: int = 5, length: int = 24) -> list[torch.Tensor]:
    return list(torch.randint(0, 320, (count, length), generator=torch.Generator().manual_seed(3)))


def _batches(*, micro_batch: int = 2) -> list[Batch]:
    return list(batches_of(_windows(), micro_batch))


def _losses(
    stack: LayerStack, batches: Sequence[Batch], *, block_sizes: tuple[int, ...]
) -> Removals:
    return block_removals(Evaluator(stack, LossMeasure(batches)), block_sizes=block_sizes)


@torch.no_grad()
def _loss_without(model: PreTrainedModel, gone: Sequence[int]) -> float:
    """The loss by the model's own code after the layers were taken out of it."""
    layers, config = model.model.layers, model.config
    types = getattr(config, "layer_types", None)
    left = [i for i in range(len(layers)) if i not in gone]
    model.model.layers = torch.nn.ModuleList(layers[i] for i in left)
    config.num_hidden_layers = len(left)
    if types is not None:
        config.layer_types = [types[i] for i in left]
    try:
        ids = torch.stack(_windows())
        return float(model(ids, labels=ids, use_cache=False).loss)
    finally:
        model.model.layers = layers
        config.num_hidden_layers = len(layers)
        if types is not None:
            config.layer_types = types


@contextmanager
def _counted(stack: LayerStack, samples: int) -> Iterator[list[int]]:
    """The numbers of the layers that ran while open, in order, once for every `samples` rows."""
    ran: list[int] = []
    handles = [
        layer.register_forward_hook(
            lambda _m, _a, out, i=i: ran.extend([i] * (len(out) // samples))
        )
        for i, layer in enumerate(stack.layers)
    ]
    yield ran
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("family", PICO_FAMILIES)
def test_losses_equal_those_of_the_model_itself(family: str) -> None:
    stack = _stack(family)
    losses = _losses(stack, _batches(), block_sizes=(1, 3))
    assert losses.baseline == pytest.approx(_loss_without(stack.model, ()), abs=1e-5)
    for n in (1, 3):
        assert len(losses.blocks[n]) == LAYERS - n + 1
        for i, loss in enumerate(losses.blocks[n]):
            direct = _loss_without(stack.model, range(i, i + n))
            assert loss == pytest.approx(direct, abs=1e-5)


def test_layers_with_their_own_masks() -> None:
    """Sliding and full layers mixed: every layer keeps its kind wherever it ends up."""
    stack = _stack(
        "qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=3,
        layer_types=["full_attention", "sliding_attention"] * 3,
    )  # fmt: skip
    losses = _losses(stack, _batches(), block_sizes=(1,))
    assert losses.baseline == pytest.approx(_loss_without(stack.model, ()), abs=1e-5)
    for i, loss in enumerate(losses.blocks[1]):
        assert loss == pytest.approx(_loss_without(stack.model, [i]), abs=1e-5)


def test_rotary_scaling_and_biases() -> None:
    stack = _stack(
        "llama", attention_bias=True, mlp_bias=True,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
        },
    )  # fmt: skip
    losses = _losses(stack, _batches(), block_sizes=(2,))
    assert losses.baseline == pytest.approx(_loss_without(stack.model, ()), abs=1e-5)
    assert losses.blocks[2][1] == pytest.approx(_loss_without(stack.model, (1, 2)), abs=1e-5)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_shared_prefix_halves_the_layer_evaluations(n: int) -> None:
    stack, layers = _stack(layers=12), 12
    batches = _batches(micro_batch=5)
    with _counted(stack, samples=5) as ran:
        _losses(stack, batches, block_sizes=(n,))
    naive = (layers - n + 1) * (layers - n)
    assert len(batches) == 1
    assert len(ran) == layers + naive // 2


def test_padding_does_not_count() -> None:
    stack = _stack()
    windows = [w[: 10 + k] for k, w in enumerate(_windows())]
    together = _losses(stack, list(batches_of(windows, 5)), block_sizes=(2,))
    alone = _losses(stack, list(batches_of(windows, 1)), block_sizes=(2,))
    assert together.baseline == pytest.approx(alone.baseline, abs=1e-5)
    assert together.blocks[2] == pytest.approx(alone.blocks[2], abs=1e-5)


def test_greedy_removes_the_cheapest_of_what_is_left() -> None:
    stack = _stack()
    removed = greedy_removal(Evaluator(stack, LossMeasure(_batches())), rounds=3)
    gone: list[int] = []
    for layer, loss in removed:
        left = [i for i in range(LAYERS) if i not in gone]
        direct = {i: _loss_without(stack.model, [*gone, i]) for i in left}
        assert layer == min(direct, key=lambda i: direct[i])
        assert loss == pytest.approx(direct[layer], abs=1e-5)
        gone.append(layer)


@pytest.mark.parametrize("family", PICO_FAMILIES)
def test_influence_is_one_minus_the_mean_cosine(family: str) -> None:
    stack = _stack(family)
    windows = _windows()
    with torch.no_grad():
        out = stack.model(torch.stack(windows), output_hidden_states=True, use_cache=False)
    # The model reports its last hidden state after the final norm; the layer's own is needed.
    states = [*out.hidden_states[:-1], _last_layer_output(stack, windows)]
    config = stack.model.config.to_dict()
    found = observe(stack, config, batches_of(windows, 2), block_sizes=(1, 4)).influence()
    for n in (1, 4):
        assert len(found[n]) == LAYERS - n + 1
        for i, value in enumerate(found[n]):
            a, b = states[i].double(), states[i + n].double()
            cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1).mean()
            assert value == pytest.approx(1 - float(cosine), abs=1e-6)


def test_scoring_runs_every_layer_once_and_never_the_head() -> None:
    stack = _stack()
    head_runs: list[int] = []
    stack.model.get_output_embeddings().register_forward_hook(lambda *_: head_runs.append(1))
    batches = _batches(micro_batch=1)
    with _counted(stack, samples=1) as ran:
        observe(stack, stack.model.config.to_dict(), batches, block_sizes=(1, 2))
    assert ran == list(range(LAYERS)) * len(batches)
    assert not head_runs


@torch.no_grad()
def _last_layer_output(stack: LayerStack, windows: list[torch.Tensor]) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    hook = stack.layers[-1].register_forward_hook(lambda _m, _a, out: seen.append(out))
    stack.model(torch.stack(windows), use_cache=False)
    hook.remove()
    return seen[0]
