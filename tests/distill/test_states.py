"""Intermediate states: taken where they should be, compared as the formulas say."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from paretron.distill.states import (
    RELATIONS,
    Captured,
    Kind,
    Pair,
    Place,
    StatesLoss,
    capturing,
    pairs_of,
)
from paretron.recipe.training import States
from pico import MOE_FAMILIES, PICO_FAMILIES, pico_model

IDS = torch.randint(3, 300, (2, 11), generator=torch.Generator().manual_seed(0))
VALID = torch.ones(2, 11, dtype=torch.bool)
EVERYTHING = States(embedding=True, output=((3, 1),), mlp_input=((2, 0),), attention=((3, 1),))


def captured(
    loss: StatesLoss, student: PreTrainedModel, teacher: PreTrainedModel
) -> tuple[Captured, Captured]:
    with (
        torch.no_grad(),
        capturing(student, loss.student_places) as own,
        capturing(teacher, loss.teacher_places) as other,
    ):
        for model in {id(m): m for m in (student, teacher)}.values():
            model(IDS, use_cache=False)
    return own, other


@pytest.mark.parametrize("family", [*PICO_FAMILIES, *MOE_FAMILIES])
def test_states_are_the_models_own(family: str) -> None:
    model = pico_model(family, num_hidden_layers=2)
    kinds: tuple[Kind, ...] = ("embedding", "output", "mlp_input", *RELATIONS)
    places = tuple(Place(kind, 0 if kind == "embedding" else 1) for kind in kinds)
    with torch.no_grad(), capturing(model, places) as found:
        hidden = model(IDS, use_cache=False, output_hidden_states=True).hidden_states
    assert torch.equal(found[places[0]], hidden[0])
    size = {kind: found[place].shape[-1] for kind, place in zip(kinds, places, strict=True)}
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    assert size["output"] == size["mlp_input"] == model.config.hidden_size
    assert size["queries"] * kv_heads == size["keys"] * heads == size["values"] * heads
    kept = dict(found)
    with torch.no_grad():
        again = model(IDS, use_cache=False, output_hidden_states=True).hidden_states
    assert torch.equal(again[1], hidden[1])
    assert all(found[place] is kept[place] for place in places)  # nothing is watched any more


def test_what_a_recipe_leaves_open_depends_on_depth() -> None:
    """Half of the layers or more gone: the embedding, and paper 1's best pair of layers, 29:13."""
    found = pairs_of(None, teacher_layers=32, student_layers=16)
    assert found == (
        Pair(Place("embedding", 0), Place("embedding", 0)),
        Pair(Place("output", 29), Place("output", 13)),
    )
    assert pairs_of(None, teacher_layers=32, student_layers=17) == ()
    assert pairs_of(None, teacher_layers=32, student_layers=32) == ()
    assert pairs_of(States(), teacher_layers=32, student_layers=16) == ()
    assert pairs_of(None, teacher_layers=4, student_layers=1)[1].student == Place("output", 0)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return 1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def squared(a: Tensor, b: Tensor) -> Tensor:
    a, b = (x / x.square().mean(-1, keepdim=True).sqrt() for x in (a, b))
    return (a - b).square().mean(-1)


@pytest.mark.parametrize("distance", ["cosine", "mse"])
def test_the_formulas_in_fp64(distance: str) -> None:
    student, teacher = pico_model(num_hidden_layers=2, seed=1), pico_model(seed=2)
    wanted = EVERYTHING.model_copy(update={"distance": distance})
    loss = StatesLoss.between(student, teacher, wanted)
    assert loss is not None
    own, other = captured(loss, student, teacher)
    valid = VALID.clone()
    valid[1, 4:] = False

    formula = cosine if distance == "cosine" else squared
    expected = torch.zeros(2, 11, dtype=torch.float64)
    kinds: tuple[tuple[Kind, int, int], ...] = (
        ("embedding", 0, 0), ("output", 3, 1), ("mlp_input", 2, 0),
    )  # fmt: skip
    for kind, t, s in kinds:
        expected += formula(own[Place(kind, s)].double(), other[Place(kind, t)].double())
    relations_of: Kind
    for relations_of in RELATIONS:
        relations = []
        for states in (own[Place(relations_of, 1)], other[Place(relations_of, 3)]):
            heads = states.double().unflatten(-1, (2, -1)).transpose(1, 2)
            scores = heads @ heads.transpose(2, 3) / math.sqrt(heads.shape[-1])
            weights = scores.exp().tril()
            relations.append(weights / weights.sum(-1, keepdim=True))
        p, q = relations[1], relations[0]
        terms = torch.where(p > 0, p * (p / q).log(), 0.0)
        expected += terms.sum(-1).mean(1)
    found = loss(own, other, valid)
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(float(expected[valid].sum()), rel=1e-5)


def test_a_narrower_student_is_mapped_and_the_map_starts_well() -> None:
    teacher = pico_model(num_hidden_layers=2, seed=2)
    student = pico_model(num_hidden_layers=2, seed=1, hidden_size=48)
    wanted = States(output=((1, 1),), attention=((1, 1),))
    loss = StatesLoss.between(student, teacher, wanted)
    assert loss is not None
    own, other = captured(loss, student, teacher)
    before = float(loss(own, other, VALID))
    loss.start(own, other)
    after = float(loss(own, other, VALID))
    states, target = own[Place("output", 1)], other[Place("output", 1)]
    (weight,) = loss.parameters()
    assert weight.shape == (64, 48)
    assert after < 0.5 * before
    # Fewer positions than channels: nearly exact.
    assert float(loss._state(states, target).mean()) < 0.1
    loss(own, other, VALID).backward()
    assert weight.grad is not None
    assert float(weight.grad.abs().max()) > 0


def test_a_student_is_no_distance_from_itself() -> None:
    model = pico_model(seed=3)
    loss = StatesLoss.between(
        model, model, States(embedding=True, output=((2, 2),), attention=((1, 1),))
    )
    assert loss is not None
    own, other = captured(loss, model, model)
    assert abs(float(loss(own, other, VALID))) < 1e-4
    assert not list(loss.parameters())


def test_relations_alone_need_no_map() -> None:
    student, teacher = pico_model(hidden_size=48), pico_model()
    loss = StatesLoss.between(student, teacher, States(attention=((1, 1),)))
    assert loss is not None
    assert not list(loss.parameters())
