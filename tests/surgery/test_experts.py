"""Pruning mixtures of experts: each expert its own neurons, and the router follows its experts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedModel

from makers import PicoMaker
from paretron.artifacts.models import load_model
from paretron.artifacts.reader import Checkpoint
from paretron.errors import Code, ParetronError
from paretron.families import expected_tensors, parameter_counts, sizes
from paretron.recipe import Prune, Score
from paretron.surgery.prune import write_pruned
from paretron.surgery.selection import Selection, choose
from pico import MOE_FAMILIES, make_pico
from picoscores import IDS, gone, prune_to, random_scores
from reload import check_reload

EXPERTS = {"mixtral": "num_local_experts", "qwen3_moe": "num_experts"}


@torch.no_grad()
def _logits(model: PreTrainedModel) -> torch.Tensor:
    return model(IDS, use_cache=False).logits


def _bytes_of(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {
        n: e.file.read_bytes()[e.start : e.start + e.nbytes] for n, e in checkpoint.entries.items()
    }


def _moe_layers(model: PreTrainedModel) -> dict[int, Any]:
    found = {i: layer.mlp for i, layer in enumerate(model.model.layers)}
    return {i: mlp for i, mlp in found.items() if dict(mlp.named_children()).keys() >= {"experts"}}


@pytest.mark.parametrize("family", MOE_FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_keeping_everything_is_byte_identical(pico: PicoMaker, family: str, dtype: str) -> None:
    model = pico(family, dtype=dtype)
    out = model.parent / "out"
    prune_to(model, out, merge_heads=True)
    assert _bytes_of(Checkpoint.open(out)) == _bytes_of(Checkpoint.open(model))
    check_reload(out)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_units_are_the_best_of_their_layer_and_their_expert(pico: PicoMaker, family: str) -> None:
    scores = random_scores(Checkpoint.open(pico(family)))
    size = {**scores.info.sizes, "experts": 3, "moe_ffn": 20}
    selection = choose(scores, sizes=size, score=Score())
    for layer in (0, 2, 3):
        kept = selection.units[layer]
        added = scores.values("experts", layer, batch="l2", sequence="mean")
        experts = added.topk(3).indices.sort().values
        assert torch.equal(kept["experts"], experts)
        all_neurons = scores.values("moe_ffn", layer, batch="l2", sequence="mean")
        neurons = all_neurons[experts].topk(20).indices.sort().values
        assert torch.equal(kept["moe_ffn"], neurons)
        assert not torch.equal(kept["moe_ffn"][0], kept["moe_ffn"][1])
        for place, expert in enumerate(experts.tolist()):
            assert selection.source_expert(layer, place) == expert
            assert torch.equal(selection.kept(layer, place)["moe_ffn"], neurons[place])
    if family == "qwen3_moe":
        assert not selection.units[1]  # an MLP of its own


def _mask_experts(model: PreTrainedModel, selection: Selection, total: int) -> None:
    """Give the router of every layer -inf for the experts that go."""
    for layer, mlp in _moe_layers(model).items():
        dropped = gone(selection.units[layer]["experts"], total)

        def route(
            module: Any, args: tuple[torch.Tensor], _out: Any, dropped: list[int] = dropped
        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            logits = nn.functional.linear(args[0], module.weight)
            logits[:, dropped] = float("-inf")
            chosen, experts = logits.float().softmax(-1).topk(module.top_k, dim=-1)
            return logits, chosen / chosen.sum(-1, keepdim=True), experts

        mlp.gate.register_forward_hook(route)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_pruned_experts_equal_masked_ones(pico: PicoMaker, family: str) -> None:
    model = pico(family)
    selection = prune_to(model, model.parent / "out", experts=3)
    masked = load_model(model)
    before = _logits(masked)
    _mask_experts(masked, selection, 4)
    found = _logits(load_model(model.parent / "out"))
    torch.testing.assert_close(found, _logits(masked))
    assert not torch.allclose(found, before)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_pruned_neurons_of_experts_equal_masked_ones(pico: PicoMaker, family: str) -> None:
    model = pico(family)
    selection = prune_to(model, model.parent / "out", moe_ffn=20)
    masked = load_model(model)
    with torch.no_grad():
        for layer, mlp in _moe_layers(masked).items():
            for expert, kept in enumerate(selection.units[layer]["moe_ffn"]):
                mlp.experts.down_proj[expert][:, gone(kept, 48)] = 0
    torch.testing.assert_close(_logits(load_model(model.parent / "out")), _logits(masked))


def test_pruned_neurons_of_the_dense_layer_equal_masked_ones(pico: PicoMaker) -> None:
    model = pico("qwen3_moe")
    selection = prune_to(model, model.parent / "out", ffn=40)
    assert [i for i, kept in selection.units.items() if kept] == [1]
    masked = load_model(model)
    with torch.no_grad():
        masked.model.layers[1].mlp.down_proj.weight[:, gone(selection.units[1]["ffn"], 96)] = 0
    torch.testing.assert_close(_logits(load_model(model.parent / "out")), _logits(masked))


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_pruned_heads_equal_masked_ones(pico: PicoMaker, family: str) -> None:
    model = pico(family)
    selection = prune_to(model, model.parent / "out", q_per_kv=1)
    masked = load_model(model)
    with torch.no_grad():
        for layer in selection.layers:
            kept = selection.units[layer]["q_per_kv"].flatten() + torch.tensor([0, 2])
            columns = [h * 32 + c for h in gone(kept, 4) for c in range(32)]
            masked.model.layers[layer].self_attn.o_proj.weight[:, columns] = 0
    torch.testing.assert_close(_logits(load_model(model.parent / "out")), _logits(masked))


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("mixtral", {}),
        ("qwen3_moe", {"mlp_only_layers": [1, 4]}),
        ("qwen3_moe", {"mlp_only_layers": [], "decoder_sparse_step": 2}),
        ("qwen3_moe", {"mlp_only_layers": [3], "decoder_sparse_step": 2}),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2, 3, 4, 5]}),
    ],
)
@pytest.mark.parametrize("kept", [(0, 3, 4), (1, 3), (0, 1, 2, 4, 5)])
def test_layers_keep_their_kind(
    pico: PicoMaker, family: str, config: dict[str, Any], kept: tuple[int, ...]
) -> None:
    model = pico(family, num_hidden_layers=6, **config)
    checkpoint = Checkpoint.open(model)
    size = sizes(checkpoint.family, checkpoint.config) | {"layers": len(kept)}
    everything = choose(random_scores(checkpoint), sizes=size | {"layers": 6}, score=Score())
    out = model.parent / "out"
    out.mkdir()
    write_pruned(checkpoint, replace(everything, layers=kept), out, sizes=size, prune=Prune())
    whole = load_model(model)
    kinds = [type(layer.mlp) for layer in whole.model.layers]
    whole.model.layers = nn.ModuleList(whole.model.layers[i] for i in kept)
    whole.config.num_hidden_layers = len(kept)
    shallow = load_model(out)
    assert [type(layer.mlp) for layer in shallow.model.layers] == [kinds[i] for i in kept]
    assert torch.equal(_logits(shallow), _logits(whole))


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_fewer_experts_than_a_token_is_routed_to(pico: PicoMaker, family: str) -> None:
    model = pico(family)
    with pytest.raises(ParetronError) as caught:
        prune_to(model, model.parent / "out", experts=1)
    (problem,) = caught.value.problems
    assert problem.code is Code.RECIPE_TARGET
    assert (problem.where, problem.fix) == ("experts", "at least 2")
    assert not list((model.parent / "out").iterdir())


def test_both_spellings_of_the_number_of_experts_are_written(pico: PicoMaker) -> None:
    model = pico("qwen3_moe")
    assert "num_experts" not in json.loads((model / "config.json").read_text())
    prune_to(model, model.parent / "out", experts=3)
    config = json.loads((model.parent / "out" / "config.json").read_text())
    assert config["num_experts"] == config["num_local_experts"] == 3


@settings(max_examples=12)
@given(
    family=st.sampled_from(MOE_FAMILIES),
    hidden=st.integers(8, 64),
    ffn=st.integers(1, 96),
    moe_ffn=st.integers(1, 48),
    experts=st.integers(2, 4),
    kv_heads=st.integers(1, 2),
    q_per_kv=st.integers(1, 2),
    layers=st.integers(2, 4),
    merge=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_feasible_target_loads(
    tmp_path_factory: pytest.TempPathFactory, family: str, merge: bool, seed: int, **new: int
) -> None:
    folder = tmp_path_factory.mktemp("any")
    model = make_pico(folder / "model", family, seed=seed)
    checkpoint = Checkpoint.open(model)
    have = sizes(checkpoint.family, checkpoint.config)
    new = {axis: n for axis, n in new.items() if axis in have}
    scores = random_scores(checkpoint, seed=seed)
    prune_to(model, folder / "out", merge_heads=merge, scores=scores, **new)
    written = Checkpoint.open(folder / "out")
    found = sizes(written.family, written.config)
    assert {axis: found[axis] for axis in new if axis in found} == {
        axis: n for axis, n in new.items() if axis in found
    }
    shapes = {n: e.shape for n, e in written.entries.items()}
    assert shapes == expected_tensors(written.family, written.config)
    loaded = load_model(folder / "out")
    total = parameter_counts(written.family, written.config).total
    assert sum(p.numel() for p in loaded.parameters()) == total
    check_reload(folder / "out")


def test_names_of_two_digits_stay_in_order(pico: PicoMaker, tmp_path: Path) -> None:
    """Experts 2 and 10 are told apart by number, not as text."""
    model = pico("mixtral", num_local_experts=12, num_hidden_layers=2)
    selection = prune_to(model, tmp_path / "out", experts=11)
    masked = load_model(model)
    _mask_experts(masked, selection, 12)
    torch.testing.assert_close(_logits(load_model(tmp_path / "out")), _logits(masked))
