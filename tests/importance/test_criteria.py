"""Every criterion against a direct computation in fp64, by names of tensors, not by a table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from makers import PicoMaker
from paretron.artifacts.reader import Checkpoint
from paretron.errors import Code, ParetronError
from paretron.families import FAMILIES, sizes
from paretron.importance.collect import batches_of
from paretron.importance.criteria import CRITERIA, Importance, Material
from paretron.importance.criteria.fluctuation import fluctuation
from paretron.importance.criteria.magnitude import magnitude
from paretron.importance.criteria.random import random
from paretron.importance.criteria.taylor import taylor
from paretron.importance.criteria.units import unit_numbers
from paretron.importance.executor import LayerStack
from paretron.importance.stream import StreamedStack
from paretron.surgery.slicing import dim_index
from pico import MOE_FAMILIES, PICO_FAMILIES, pico_model

LAYERS, HEADS, GROUPS, HEAD_DIM, FFN, HIDDEN = 4, 4, 2, 32, 96, 64


def _windows(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 320, (n,), generator=generator) for n in lengths or (24,) * 5]


def _material(model: Path, *lengths: int, micro_batch: int = 2, **more: Any) -> Material:
    checkpoint = Checkpoint.open(model)
    stack = LayerStack(_model(model), checkpoint.family)
    batches = list(batches_of(_windows(*lengths), micro_batch))
    return Material(checkpoint, stack, batches, **more)


def _model(path: Path) -> Any:
    from paretron.artifacts.models import load_model

    return load_model(path)


def _by_hand(values: Mapping[str, torch.Tensor], layer: int) -> dict[str, torch.Tensor]:
    """Sums over the weights of each unit of a Llama's layer, from a value for every weight."""
    v = {n.removeprefix(f"model.layers.{layer}."): x.double() for n, x in values.items()}
    query = v["self_attn.q_proj.weight"].reshape(HEADS, -1).sum(1)
    read = v["self_attn.o_proj.weight"].reshape(HIDDEN, HEADS, HEAD_DIM).sum((0, 2))
    heads = query + read
    keys = sum(v[f"self_attn.{x}_proj.weight"].reshape(GROUPS, -1).sum(1) for x in "kv")
    mlp = v["mlp.gate_proj.weight"].sum(1) + v["mlp.up_proj.weight"].sum(1)
    return {
        "heads": heads,
        "kv_heads": heads.view(GROUPS, -1).sum(1) + keys,
        "ffn": mlp + v["mlp.down_proj.weight"].sum(0),
    }


def _hidden_by_hand(values: Mapping[str, torch.Tensor]) -> torch.Tensor:
    total = torch.zeros(HIDDEN, dtype=torch.float64)
    for name, value in values.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            total += value.double().sum(1)
        else:
            total += value.double().reshape(-1, HIDDEN).sum(0)
    return total


def _assert_close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-6) -> None:
    scale = float(wanted.abs().max())
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * scale)


def _assert_same(one: Importance, other: Importance, tolerance: float = 1e-6) -> None:
    assert one.units.keys() == other.units.keys()
    for axis, values in one.units.items():
        _assert_close(other.units[axis], values, tolerance)
        ranks = [v.argsort(descending=True, stable=True) for v in (values, other.units[axis])]
        assert torch.equal(*ranks)
    if one.layers is not None:
        assert other.layers is not None
        _assert_close(other.layers, one.layers, tolerance)


@pytest.mark.parametrize("family", [*PICO_FAMILIES, *MOE_FAMILIES])
def test_units_lie_where_surgery_cuts_them(family: str) -> None:
    """The entries of a unit are those that stay when it alone is kept."""
    table = FAMILIES[family]
    size = sizes(table, pico_model(family).config.to_dict())
    for row in table.tensors:
        for dim in row.dims:
            for axis in ("hidden", "kv_heads", "ffn", "experts", "moe_ffn"):
                numbers = unit_numbers(dim, (axis,), size) if axis in size else torch.empty(0)
                if not (numbers >= 0).any():
                    continue
                last = size[axis] - 1
                index = dim_index(dim, sizes=size, kept={axis: torch.tensor([last])})
                kept = torch.arange(len(numbers))[index]
                assert torch.equal(kept, (numbers == last).nonzero().flatten())


def test_magnitude_is_the_norm_over_all_tensors(pico: PicoMaker) -> None:
    material = _material(pico("llama", dtype="bfloat16"))
    found = magnitude(material)
    weights = dict(material.stack.model.named_parameters())
    squares = {name: w.detach().double().square() for name, w in weights.items()}
    for i in range(LAYERS):
        for axis, wanted in _by_hand(squares, i).items():
            _assert_close(found.units[axis][i], wanted.sqrt(), 1e-12)
        own = [w for n, w in weights.items() if n.startswith(f"model.layers.{i}.")]
        assert found.layers is not None
        wanted_layer = sum(w.detach().double().abs().sum() for w in own)
        assert float(found.layers[i]) == pytest.approx(float(wanted_layer), rel=1e-12)
    _assert_close(found.units["hidden"][0], _hidden_by_hand(squares).sqrt(), 1e-12)


def test_fused_matrices_count_every_segment(pico: PicoMaker) -> None:
    """Phi-3's gate and up are one matrix: a neuron is two of its rows and a column."""
    material = _material(pico("phi3"))
    found = magnitude(material)
    weights = dict(material.stack.model.named_parameters())
    both = weights["model.layers.1.mlp.gate_up_proj.weight"].detach().double().square().sum(1)
    down = weights["model.layers.1.mlp.down_proj.weight"].detach().double().square().sum(0)
    _assert_close(found.units["ffn"][1], (both.view(2, FFN).sum(0) + down).sqrt(), 1e-12)


def test_experts_and_their_neurons(pico: PicoMaker) -> None:
    """The third layer is the second with experts: its places follow those of the first."""
    material = _material(pico("qwen3_moe"))
    found = magnitude(material)
    read = material.checkpoint.read
    mlp = "model.layers.2.mlp."
    for e in range(4):
        names = [f"{mlp}experts.{e}.{x}_proj.weight" for x in ("gate", "up", "down")]
        gate, up, down = (read(name).double().square() for name in names)
        _assert_close(
            found.units["moe_ffn"][4 + e], (gate.sum(1) + up.sum(1) + down.sum(0)).sqrt(), 1e-12
        )
        router = read(f"{mlp}gate.weight")[e].double().square().sum()
        whole = (gate.sum() + up.sum() + down.sum() + router).sqrt()
        _assert_close(found.units["experts"][1, e], whole, 1e-12)


def test_taylor_is_weight_times_gradient_of_the_mean_loss(pico: PicoMaker) -> None:
    material = _material(pico())
    found = taylor(material)
    model = _model(material.checkpoint.path).double()
    ids = torch.stack(_windows())
    model(ids, labels=ids, use_cache=False).loss.backward()
    products = {
        n: (w.detach() * w.grad).abs() for n, w in model.named_parameters() if w.grad is not None
    }
    for i in range(LAYERS):
        for axis, wanted in _by_hand(products, i).items():
            _assert_close(found.units[axis][i], wanted, 1e-4)  # the model itself runs in fp32
    _assert_close(found.units["hidden"][0], _hidden_by_hand(products), 1e-4)
    assert found.layers is not None
    layer = sum(float(p.sum()) for n, p in products.items() if n.startswith("model.layers.2."))
    assert float(found.layers[2]) == pytest.approx(layer, rel=1e-4)
    assert all(p.grad is None for p in material.stack.model.parameters())


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("name", ["taylor", "fluctuation"])
def test_batches_order_and_processes_do_not_matter(pico: PicoMaker, family: str, name: str) -> None:
    """Gradients cancel between samples: absolute values are taken once, of the sum."""
    model, lengths = pico(family), (24, 9, 17, 24, 1, 12)
    whole = CRITERIA[name](_material(model, *lengths, micro_batch=1))
    for micro_batch in (2, 6):
        _assert_same(whole, CRITERIA[name](_material(model, *lengths, micro_batch=micro_batch)))
    material = _material(model, *lengths)
    backwards = Material(material.checkpoint, material.stack, list(reversed(material.batches)))
    _assert_same(whole, CRITERIA[name](backwards))
    # As many processes with the same samples each: means stay what they are.
    _assert_same(whole, CRITERIA[name](_material(model, *lengths, total=lambda x: 3 * x)))


@torch.no_grad()
def test_fluctuation_is_variance_times_the_squared_column(pico: PicoMaker) -> None:
    material = _material(pico(), 24, 9, 17)
    found = fluctuation(material)
    model = _model(material.checkpoint.path).double()
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _m, args, name=name: seen.setdefault(name, []).append(args[0][0])
            )
    for window in _windows(24, 9, 17):
        model(window[None], use_cache=False)

    def channels(name: str) -> torch.Tensor:
        weight = model.get_submodule(name).weight
        return torch.cat(seen[name]).var(0, correction=0) * weight.square().sum(0)

    hidden = channels("lm_head")
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        _assert_close(found.units["ffn"][i], channels(f"{layer}mlp.down_proj"), 1e-5)
        heads = channels(f"{layer}self_attn.o_proj").view(HEADS, HEAD_DIM).sum(1)
        _assert_close(found.units["heads"][i], heads, 1e-5)
        for name in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up"):
            hidden = hidden + channels(f"{layer}{name}_proj")
    _assert_close(found.units["hidden"][0], hidden, 1e-5)


@torch.no_grad()
def test_a_token_that_an_expert_never_sees_is_a_zero(pico: PicoMaker) -> None:
    material = _material(pico("mixtral"), 24, 9)
    found = fluctuation(material)
    model = _model(material.checkpoint.path)
    experts = model.get_submodule("model.layers.1.mlp.experts")
    neurons: list[torch.Tensor] = []

    def note(_: object, args: tuple[torch.Tensor, ...]) -> None:
        hidden, chosen, _weights = args
        gate, up = (hidden @ experts.gate_up_proj[2].T).double().chunk(2, -1)
        inner = torch.nn.functional.silu(gate) * up
        neurons.append(torch.where((chosen == 2).any(-1, keepdim=True), inner, 0.0))

    experts.register_forward_pre_hook(note)
    for window in _windows(24, 9):
        model(window[None], use_cache=False)
    column = experts.down_proj[2].double().square().sum(0)
    wanted = torch.cat(neurons).var(0, correction=0) * column
    _assert_close(found.units["moe_ffn"][4 + 2], wanted, 1e-5)


@pytest.mark.parametrize("family", ["gemma2", "olmo2", "nemotron", "mixtral"])
def test_fluctuation_streamed_is_the_same(pico: PicoMaker, family: str) -> None:
    """Also where norms stand elsewhere, or where embedding and head are one."""
    material = _material(pico(family), 24, 9, 17)
    checkpoint = material.checkpoint
    stack = StreamedStack(checkpoint, dtype=torch.float32, device=torch.device("cpu"))
    streamed = fluctuation(Material(checkpoint, stack, material.batches))
    _assert_same(fluctuation(material), streamed)


def test_random_follows_the_seed_and_nothing_else(pico: PicoMaker) -> None:
    model = pico("qwen3_moe")
    one, same = random(_material(model, seed=7)), random(_material(model, 9, 30, seed=7))
    other = random(_material(model, seed=8))
    for axis, values in one.units.items():
        assert torch.equal(values, same.units[axis])
        assert not (values == other.units[axis]).any()
        assert len(values.unique()) == values.numel()  # no two layers or axes draw alike
    assert one.layers is not None
    assert same.layers is not None
    assert torch.equal(one.layers, same.layers)


@pytest.mark.parametrize("name", ["magnitude", "taylor"])
def test_a_head_with_its_own_keys_is_its_group(pico: PicoMaker, name: str) -> None:
    found = CRITERIA[name](_material(pico(num_key_value_heads=4)))
    assert torch.equal(found.units["heads"], found.units["kv_heads"])


def test_equal_neurons_are_equal(pico: PicoMaker) -> None:
    model = pico()
    checkpoint = Checkpoint.open(model)
    stack = LayerStack(pico_model(), checkpoint.family)
    with torch.no_grad():
        for name in ("gate_proj", "up_proj", "down_proj"):
            weight = stack.layers[1].get_submodule(f"mlp.{name}").get_parameter("weight")
            one = weight[:, :1] if name == "down_proj" else weight[:1]
            weight.copy_(one.expand_as(weight))
    batches = list(batches_of(_windows(), 2))
    values = taylor(Material(checkpoint, stack, batches)).units["ffn"][1]
    assert float((values - values[0]).abs().max()) <= 1e-6 * float(values[0])


@pytest.mark.parametrize(
    ("name", "where"),
    [("taylor", "model.layers.2.mlp.up_proj.weight"), ("fluctuation", "2.mlp.down_proj")],
)
def test_no_numbers_name_where_they_are(pico: PicoMaker, name: str, where: str) -> None:
    """A gradient that overflows on its way back, an activation that does on its way on."""
    material = _material(pico())
    layer = material.stack.layers[2]
    if name == "taylor":
        up = layer.get_submodule("mlp.up_proj")
        up.register_full_backward_hook(lambda _m, given, _out: given)
        up.get_parameter("weight").register_hook(lambda g: g * torch.inf)
    else:
        layer.get_submodule("mlp.up_proj").register_forward_hook(lambda _m, _a, out: out * 1e38)
    with pytest.raises(ParetronError) as caught:
        CRITERIA[name](material)
    (problem,) = caught.value.problems
    assert problem.code is Code.GATE_NONFINITE
    assert problem.where.endswith(where)


def test_a_gradient_that_reaches_nothing(pico: PicoMaker) -> None:
    material = _material(pico())
    norm = material.stack.layers[0].get_submodule("input_layernorm")
    norm.get_parameter("weight").register_post_accumulate_grad_hook(lambda _: None)
    norm.register_forward_hook(lambda _m, args, _out: args[0])
    with pytest.raises(ParetronError) as caught:
        taylor(material)
    (problem,) = caught.value.problems
    assert problem.code is Code.INPUT_FAMILY
    assert problem.where == "model.layers.0.input_layernorm.weight"


def test_samples_of_one_token_have_no_loss(pico: PicoMaker) -> None:
    with pytest.raises(ParetronError) as caught:
        taylor(_material(pico(), 1, 1))
    assert caught.value.problems[0].code is Code.INPUT_CORPUS
