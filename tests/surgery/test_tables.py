"""Every family's table against the model itself: names, shapes, and what each axis means.

Shapes alone cannot tell a table that is right from one that names another axis of equal size, or
nests the same factors the other way round. Reordering an axis everywhere the table says can: the
logits must not move. The checks are then broken on purpose, one entry of a table at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from paretron.artifacts.held import in_memory
from paretron.errors import ParetronError
from paretron.families import (
    FAMILIES,
    Family,
    Placed,
    Tensor,
    expected_tensors,
    placed_tensors,
    sizes,
)
from paretron.families.table import AXES, DENSE_LAYER, MOE_LAYER
from paretron.surgery.slicing import Kept, slice_tensor
from pico import MOE_FAMILIES, PICO_FAMILIES, pico_model
from picoscores import IDS

ALL_FAMILIES = (*PICO_FAMILIES, *MOE_FAMILIES)
PRUNED = ("hidden", "ffn", "kv_heads", "q_per_kv", "experts", "moe_ffn")
MOVED = 1e-3  # far above rounding, far below what a wrong order does
# Head counts, and then hidden, MLP and head sizes, coincide: shapes catch as little as they can.
ALIKE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 32, "head_dim": 32, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 2, "moe_intermediate_size": 32,
}  # fmt: skip
# The config flags that each family's rows depend on; all rows are there when all are true.
FLAGS = {
    name: dict.fromkeys(
        (t.when for t in family.tensors if t.when in ("attention_bias", "mlp_bias", "use_bias")),
        True,
    )
    for name, family in FAMILIES.items()
}


@dataclass(frozen=True)
class Subject:
    """A model, its weights as on disk, and what it computes."""

    model: PreTrainedModel
    config: Mapping[str, Any]
    state: Mapping[str, torch.Tensor]
    logits: torch.Tensor

    @classmethod
    def of(cls, family: str, **config: Any) -> Subject:
        model = pico_model(family, **{**FLAGS[family], **config}).double()
        state = {n: t.clone() for n, t in _on_disk(model).items()}
        if model.config.tie_word_embeddings:
            del state["lm_head.weight"]
        return cls(model, model.config.to_dict(), state, _logits(model))


def _on_disk(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The model's state under the names that transformers would save it by."""
    return revert_weight_conversion(model, model.state_dict())


@torch.no_grad()
def _logits(model: PreTrainedModel) -> torch.Tensor:
    return model(IDS, use_cache=False).logits


def _permutation(axis: str, size: Mapping[str, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(axis))
    if axis == "q_per_kv":  # every group its own order
        rows = [torch.randperm(size[axis], generator=generator) for _ in range(size["kv_heads"])]
        order = torch.stack(rows)
        return order if not torch.equal(order, order.sort().values) else order.flip(-1)
    order = torch.randperm(size[axis], generator=generator)
    return order if not torch.equal(order, torch.arange(size[axis])) else order.flip(0)


def _moved_by(subject: Subject, family: Family, axis: str) -> float:
    """How far the logits move when an axis is reordered wherever the table says."""
    size = sizes(family, subject.config)
    kept: Kept = {axis: _permutation(axis, size)}
    permuted = dict(subject.state)
    for place in placed_tensors(family, subject.config):
        source = place
        if place.expert is not None and axis == "experts":
            source = Placed(place.row, place.layer, int(kept["experts"][place.expert]))
        if source.name in permuted:
            permuted[place.name] = slice_tensor(
                subject.state[source.name], place.row, sizes=size, kept=kept
            )
    real = FAMILIES[family.model_type]
    subject.model.load_state_dict(in_memory(permuted, real, subject.config), strict=False)
    moved = _logits(subject.model)
    if axis == "vocab":
        moved = _unpermuted_vocab(subject, kept[axis])
    return float((moved - subject.logits).abs().max())


@torch.no_grad()
def _unpermuted_vocab(subject: Subject, order: torch.Tensor) -> torch.Tensor:
    """Logits by a model whose vocabulary is reordered, asked in its own numbering."""
    new_number = order.argsort()
    return subject.model(new_number[IDS], use_cache=False).logits[..., new_number]


def _shapes(subject: Subject) -> dict[str, tuple[int, ...]]:
    return {n: tuple(t.shape) for n, t in subject.state.items()}


@pytest.mark.parametrize("config", [{}, {"tie_word_embeddings": True}, ALIKE])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_table_equals_state_dict(family: str, config: dict[str, Any]) -> None:
    for settings in (FLAGS[family], {}):
        model = pico_model(family, **{**settings, **config})
        found = {n: tuple(t.shape) for n, t in _on_disk(model).items()}
        if config.get("tie_word_embeddings"):
            del found["lm_head.weight"]
        assert expected_tensors(FAMILIES[family], model.config.to_dict()) == found


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_permutation_oracle(family: str) -> None:
    subject = Subject.of(family)
    size = sizes(FAMILIES[family], subject.config)
    for axis in (a for a in (*PRUNED, "vocab") if a in size):
        assert _moved_by(subject, FAMILIES[family], axis) < 1e-5, axis
    assert _moved_by(subject, FAMILIES[family], "head_dim") > MOVED


def _mutants(family: Family) -> Iterator[tuple[str, Family]]:
    """The table with one entry changed: a row dropped, dimensions or factors swapped, an axis
    replaced, a condition turned."""
    for k, row in enumerate(family.tensors):

        def changed(new: Tensor | None, k: int = k) -> Family:
            rows = list(family.tensors)
            rows[k : k + 1] = [] if new is None else [new]
            return replace(family, tensors=tuple(rows))

        yield f"{row.name}: dropped", changed(None)
        kinds = {t.when for t in family.tensors} & {MOE_LAYER, DENSE_LAYER}
        for when in ("", "untied", "attention_bias", "mlp_bias", "use_bias", *kinds):
            if when != row.when:
                yield f"{row.name}: when {when}", changed(replace(row, when=when))
        for text in _dims_mutants(row.dims_text):
            yield f"{row.name}: {text}", changed(replace(row, dims_text=text))


def _dims_mutants(text: str) -> Iterator[str]:
    dims = [list(dim) for dim in Tensor("", text).dims]

    def written(new: Sequence[Sequence[Sequence[str]]]) -> str:
        return ", ".join(" | ".join("*".join(segment) for segment in dim) for dim in new)

    def with_segment(d: int, s: int, *segments: Sequence[str]) -> str:
        return written([*dims[:d], [*dims[d][:s], *segments, *dims[d][s + 1 :]], *dims[d + 1 :]])

    if len(dims) == 2:
        yield written(dims[::-1])
    for d, dim in enumerate(dims):
        for s, segment in enumerate(dim):
            if len(dim) > 1:
                yield with_segment(d, s)
            if s and dim[s - 1] != segment:
                swapped = [*dim[: s - 1], segment, dim[s - 1], *dim[s + 1 :]]
                yield written([*dims[:d], swapped, *dims[d + 1 :]])
            for a, axis in enumerate(segment):
                for other in AXES:
                    if other != axis:
                        yield with_segment(d, s, [*segment[:a], other, *segment[a + 1 :]])
                if a and segment[a - 1] != axis:
                    yield with_segment(
                        d, s, [*segment[: a - 1], axis, segment[a - 1], *segment[a + 1 :]]
                    )


def _is_caught(subjects: list[Subject], mutant: Family) -> bool:
    for subject in subjects:
        try:
            if expected_tensors(mutant, subject.config) != _shapes(subject):
                return True
            size = sizes(mutant, subject.config)
            if any(_moved_by(subject, mutant, a) > 1e-5 for a in PRUNED if a in size):
                return True
            if _moved_by(subject, mutant, "head_dim") < MOVED:
                return True
        except (ParetronError, KeyError, RuntimeError, IndexError):
            return True
    return False


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_broken_table_is_caught(family: str) -> None:
    subjects = [Subject.of(family, **ALIKE), Subject.of(family, **ALIKE, tie_word_embeddings=True)]
    plain = dict.fromkeys(FLAGS[family], False)
    if plain:
        subjects.append(Subject.of(family, **ALIKE, **plain))
    if len(plain) > 1:
        subjects += [Subject.of(family, **ALIKE, **(plain | {k: True})) for k in plain]
    assert not _is_caught(subjects, FAMILIES[family])
    results = {what: _is_caught(subjects, mutant) for what, mutant in _mutants(FAMILIES[family])}
    missed = [what for what, caught in results.items() if not caught]
    assert len(results) > 150
    assert len(missed) <= 0.01 * len(results), missed
