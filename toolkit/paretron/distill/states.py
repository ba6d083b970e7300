"""Intermediate states that a student imitates besides the logits (paper 1, section 3; table 17).

States are taken at the borders of layers and compared after normalisation, as the paper does: what
a norm will make of them counts, not their length. Where the student is narrower, one linear map,
shared by all states, takes its states to the teacher's width; it is learned along and thrown away.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from paretron.families import family_of, sizes
from paretron.recipe.training import States

Kind = Literal["embedding", "output", "mlp_input", "queries", "keys", "values"]
RELATIONS: tuple[Kind, ...] = ("queries", "keys", "values")
# The third layer from the end imitates the third from the end: paper 1's best pair, 29:13.
_FROM_THE_END = 3
# Of the mean diagonal: keeps the first map tame where a batch has fewer tokens than channels.
_RIDGE = 1e-3


@dataclass(frozen=True)
class Place:
    """Where in a model a state is taken; `layer` is 0 for the embedding."""

    kind: Kind
    layer: int


Captured = Mapping[Place, Tensor]  # [batch, seq, channels] each


@dataclass(frozen=True)
class Pair:
    """A teacher's place and the student's that imitates it."""

    teacher: Place
    student: Place


def pairs_of(
    wanted: States | None, *, teacher_layers: int, student_layers: int
) -> tuple[Pair, ...]:
    """The pairs that a recipe asks for.

    Without a word on states (None), embedding and output of the third layer from the end are taken
    when half of the layers or more are gone, and nothing otherwise (paper 1, best practice 6).
    """
    if wanted is None:
        if 2 * student_layers > teacher_layers:
            return ()
        last = max(0, teacher_layers - _FROM_THE_END), max(0, student_layers - _FROM_THE_END)
        wanted = States(embedding=True, output=(last,))
    pairs = [Pair(Place("embedding", 0), Place("embedding", 0))] if wanted.embedding else []
    pairs += [Pair(Place("output", t), Place("output", s)) for t, s in wanted.output]
    pairs += [Pair(Place("mlp_input", t), Place("mlp_input", s)) for t, s in wanted.mlp_input]
    for t, s in wanted.attention:
        pairs += [Pair(Place(kind, t), Place(kind, s)) for kind in RELATIONS]
    return tuple(pairs)


@contextmanager
def capturing(model: PreTrainedModel, places: tuple[Place, ...]) -> Iterator[dict[Place, Tensor]]:
    """While open, a forward pass leaves the states of these places in the dictionary."""
    found: dict[Place, Tensor] = {}
    handles = [_watch(model, place, found) for place in places]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class StatesLoss(nn.Module):
    """L_is: the sum over pairs of how far the student's states are from the teacher's."""

    def __init__(
        self,
        pairs: tuple[Pair, ...],
        *,
        distance: Literal["cosine", "mse"],
        widths: tuple[int, int],
        relation_heads: int,
    ) -> None:
        """`widths` are the hidden sizes of student and teacher."""
        super().__init__()
        self.pairs = pairs
        self.distance = distance
        self.relation_heads = relation_heads
        own, other = widths
        # Relations are compared among positions, whatever the width.
        mapped = own != other and any(p.student.kind not in RELATIONS for p in pairs)
        self.map = nn.Linear(own, other, bias=False) if mapped else nn.Identity()

    @classmethod
    def between(
        cls, student: PreTrainedModel, teacher: PreTrainedModel, wanted: States | None
    ) -> StatesLoss | None:
        """The loss of a pair of models, None where no state is to be imitated."""
        own, other = (_sizes(model) for model in (student, teacher))
        pairs = pairs_of(wanted, teacher_layers=other["layers"], student_layers=own["layers"])
        if not pairs:
            return None
        return cls(
            pairs,
            distance=wanted.distance if wanted else "cosine",
            widths=(own["hidden"], other["hidden"]),
            relation_heads=math.gcd(own["kv_heads"], other["kv_heads"]),
        )

    @property
    def student_places(self) -> tuple[Place, ...]:
        """What must be captured of the student."""
        return tuple(dict.fromkeys(pair.student for pair in self.pairs))

    @property
    def teacher_places(self) -> tuple[Place, ...]:
        """What must be captured of the teacher."""
        return tuple(dict.fromkeys(pair.teacher for pair in self.pairs))

    def forward(self, student: Captured, teacher: Captured, valid: Tensor) -> Tensor:
        """Summed over the valid positions, [batch, seq] bool; a scalar in fp64."""
        losses = [
            self._relation(student[pair.student], teacher[pair.teacher])
            if pair.student.kind in RELATIONS
            else self._state(student[pair.student], teacher[pair.teacher])
            for pair in self.pairs
        ]
        return torch.stack([loss[valid].sum(dtype=torch.float64) for loss in losses]).sum()

    @torch.no_grad()
    def start(self, student: Captured, teacher: Captured) -> None:
        """Let the map begin as the ridge regression of the teacher's states on the student's."""
        if isinstance(self.map, nn.Identity):
            return
        pairs = [p for p in self.pairs if p.student.kind not in RELATIONS]
        own = torch.cat([_normed(student[p.student]).flatten(0, 1).double() for p in pairs])
        other = torch.cat([_normed(teacher[p.teacher]).flatten(0, 1).double() for p in pairs])
        gram = own.t() @ own
        gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
        self.map.weight.copy_(torch.linalg.solve(gram, own.t() @ other).t())

    def _state(self, own: Tensor, other: Tensor) -> Tensor:
        """[batch, seq]: 1 - cosine, or the mean squared difference over channels."""
        own, other = self.map(_normed(own)).float(), _normed(other)
        if self.distance == "cosine":
            return 1 - torch.cosine_similarity(own, other, dim=-1)
        return (own - other).square().mean(dim=-1)

    def _relation(self, own: Tensor, other: Tensor) -> Tensor:
        """[batch, seq]: KL between self-relations softmax(A A^T / sqrt(d)), mean over heads.

        MiniLMv2 (Wang et al. 2021, section 3), each position related to those before it.
        """
        log_own, log_other = (self._log_relations(x) for x in (own, other))
        kl = (log_other.exp() * (log_other - log_own)).nan_to_num()  # 0 times (-inf - -inf)
        return kl.sum(dim=-1).mean(dim=1)

    def _log_relations(self, states: Tensor) -> Tensor:
        heads = states.float().unflatten(-1, (self.relation_heads, -1)).transpose(1, 2)
        scores = heads @ heads.transpose(-1, -2) / math.sqrt(heads.shape[-1])
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        return torch.log_softmax(scores.masked_fill(later, -math.inf), dim=-1)


def _sizes(model: PreTrainedModel) -> Mapping[str, int]:
    config = model.config.to_dict()
    return sizes(family_of(config), config)


def _normed(states: Tensor) -> Tensor:
    return functional.rms_norm(states.float(), states.shape[-1:], eps=1e-6)


def _watch(
    model: PreTrainedModel, place: Place, found: dict[Place, Tensor]
) -> torch.utils.hooks.RemovableHandle:
    layer = model.base_model.layers[place.layer]
    if place.kind == "output":
        return layer.register_forward_hook(lambda _m, _args, out: found.update({place: out}))
    if place.kind in RELATIONS:
        return _watch_projection(model, place, found)
    module = layer if place.kind == "embedding" else layer.mlp
    return module.register_forward_pre_hook(lambda _m, args: found.update({place: args[0]}))


def _watch_projection(
    model: PreTrainedModel, place: Place, found: dict[Place, Tensor]
) -> torch.utils.hooks.RemovableHandle:
    """Query, key or value; a family may make all three in one matrix, in this order."""
    which = RELATIONS.index(place.kind)
    attention = dict(model.base_model.layers[place.layer].self_attn.named_children())
    fused = attention.get("qkv_proj")
    if fused is None:
        projection = attention[("q_proj", "k_proj", "v_proj")[which]]
        return projection.register_forward_hook(lambda _m, _args, out: found.update({place: out}))
    size = _sizes(model)
    kv = size["kv_heads"] * size["head_dim"]
    parts = [kv * size["q_per_kv"], kv, kv]
    return fused.register_forward_hook(
        lambda _m, _args, out: found.update({place: out.split(parts, dim=-1)[which]})
    )
