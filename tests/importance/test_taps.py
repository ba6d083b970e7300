"""Taps follow from the family's table, and one that matches nothing is an error."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from paretron.errors import Code, ParetronError
from paretron.families import FAMILIES, Tensor
from paretron.importance.collect import batches_of, observe
from paretron.importance.executor import LayerStack
from paretron.importance.taps import find_taps, tapped
from pico import PICO_FAMILIES, pico_model

FOUR = (
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)  # fmt: skip
NORMS = {"gemma2": FOUR, "gemma3_text": FOUR, "olmo2": (FOUR[1], FOUR[3])}


@pytest.mark.parametrize("family", PICO_FAMILIES)
def test_taps_of_every_family(family: str) -> None:
    config = pico_model(family).config.to_dict()
    taps = find_taps(FAMILIES[family], config)
    found = {a: [t for t in taps if t.axis == a] for a in ("heads", "ffn", "hidden")}
    assert [t.module for t in found["heads"]] == [
        f"model.layers.{i}.self_attn.o_proj" for i in range(4)
    ]
    assert {(t.units, t.channels, t.side) for t in found["heads"]} == {(4, 32, "input")}
    assert {(t.units, t.channels, t.side) for t in found["ffn"]} == {(96, 1, "input")}
    assert [t.module for t in found["hidden"]] == [
        *(
            f"model.layers.{i}.{norm}"
            for i in range(4)
            for norm in NORMS.get(family, ("input_layernorm", "post_attention_layernorm"))
        ),
        "model.norm",
    ]
    assert {(t.units, t.channels, t.side) for t in found["hidden"]} == {(64, 1, "output")}


def test_tap_that_matches_no_module_is_an_error() -> None:
    model = pico_model()
    rows = tuple(
        Tensor(t.name.replace("down_proj", "w2"), t.dims_text, t.when)
        for t in FAMILIES["llama"].tensors
    )
    family = replace(FAMILIES["llama"], tensors=rows)
    with pytest.raises(ParetronError) as caught:
        observe(
            LayerStack(model, family),
            model.config.to_dict(),
            batches_of([torch.arange(5)], micro_batch=1),
        )
    assert caught.value.problems[0].code is Code.INPUT_FAMILY
    assert caught.value.problems[0].where == "model.layers.0.mlp.w2"


def test_tap_that_never_fires_is_an_error() -> None:
    model = pico_model()
    taps = find_taps(FAMILIES["llama"], model.config.to_dict())
    with (
        pytest.raises(ParetronError, match="never run"),
        tapped(model, taps, lambda number, activation, here: None),
    ):
        pass


def test_hooks_are_gone_afterwards() -> None:
    model = pico_model()
    observe(
        LayerStack(model, FAMILIES["llama"]),
        model.config.to_dict(),
        batches_of([torch.arange(5)], micro_batch=1),
    )
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)


def test_nan_activation_names_its_module() -> None:
    model = pico_model()
    with torch.no_grad():
        model.get_submodule("model.layers.2.mlp.up_proj").weight[3] = float("nan")
    with pytest.raises(ParetronError) as caught:
        observe(
            LayerStack(model, FAMILIES["llama"]),
            model.config.to_dict(),
            batches_of([torch.arange(5)], micro_batch=1),
        )
    assert caught.value.problems[0].code is Code.GATE_NONFINITE
    assert caught.value.problems[0].where == "model.layers.2.mlp.down_proj"


@pytest.mark.parametrize("windows", [[], [torch.arange(5), torch.arange(0)]])
def test_no_samples_or_an_empty_one(windows: list[torch.Tensor]) -> None:
    model = pico_model()
    with pytest.raises(ParetronError) as caught:
        observe(
            LayerStack(model, FAMILIES["llama"]),
            model.config.to_dict(),
            batches_of(windows, micro_batch=2),
        )
    assert caught.value.problems[0].code is Code.INPUT_CORPUS
