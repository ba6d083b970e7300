"""Ranking on slices of one resident model: equal to really pruning, and without copies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from makers import PicoMaker
from paretron.artifacts.models import load_model
from paretron.artifacts.reader import Checkpoint
from paretron.families import sizes
from paretron.recipe import Prune, Score
from paretron.search.resident import Resident, mean_loss, pruned_models
from paretron.surgery.prune import write_pruned
from paretron.surgery.selection import choose
from pico import MOE_FAMILIES, PICO_FAMILIES
from picoscores import random_scores

SHAPES: tuple[dict[str, int], ...] = (
    {"hidden": 48},
    {"ffn": 40, "layers": 3},
    {"q_per_kv": 1},
    {"kv_heads": 1, "hidden": 32},
    {"hidden": 40, "ffn": 64, "layers": 2, "kv_heads": 1, "q_per_kv": 1},
)
WINDOWS = [torch.randint(0, 300, (n,), generator=torch.Generator().manual_seed(n)) for n in (9, 24)]


def pruned_loss(checkpoint: Checkpoint, size: dict[str, int], folder: Path, **prune: Any) -> float:
    selection = choose(random_scores(checkpoint), sizes=size, score=Score())
    folder.mkdir()
    write_pruned(checkpoint, selection, folder, sizes=size, prune=Prune(**prune))
    return mean_loss(load_model(folder), WINDOWS, micro_batch=2)


@pytest.mark.parametrize(
    ("family", "merge_heads"), [*((family, True) for family in PICO_FAMILIES), ("llama", False)]
)
def test_the_loss_is_that_of_really_pruning(
    family: str, merge_heads: bool, pico: PicoMaker, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(pico(family))
    have = sizes(checkpoint.family, checkpoint.config)
    resident = Resident(
        checkpoint, random_scores(checkpoint), score=Score(), merge_heads=merge_heads
    )
    for k, changed in enumerate(SHAPES):
        size = {**have, **changed}
        loss = mean_loss(resident.model(size), WINDOWS, micro_batch=2)
        wanted = pruned_loss(checkpoint, size, tmp_path / str(k), merge_heads=merge_heads)
        assert loss == pytest.approx(wanted, abs=1e-5), changed


@pytest.mark.parametrize(
    ("changed", "config"),
    [
        ({"q_per_kv": 1, "hidden": 40}, {"tie_word_embeddings": True}),
        ({"kv_heads": 2, "ffn": 40}, {"num_key_value_heads": 4}),  # heads merge whole
    ],
)
def test_tied_embeddings_and_heads_of_their_own(
    changed: dict[str, int], config: dict[str, Any], pico: PicoMaker, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(pico("llama", **config))
    size = {**sizes(checkpoint.family, checkpoint.config), **changed}
    resident = Resident(checkpoint, random_scores(checkpoint), score=Score(), merge_heads=True)
    loss = mean_loss(resident.model(size), WINDOWS, micro_batch=2)
    wanted = pruned_loss(checkpoint, size, tmp_path / "pruned")
    assert loss == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_shapes_of_experts_are_really_pruned(family: str, pico: PicoMaker, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(pico(family))
    have = sizes(checkpoint.family, checkpoint.config)
    size = {**have, "hidden": 48, "experts": have["experts"] - 1}
    models = pruned_models(checkpoint, random_scores(checkpoint), score=Score(), prune=Prune())
    loss = mean_loss(models.model(size), WINDOWS, micro_batch=2)
    assert loss == pytest.approx(pruned_loss(checkpoint, size, tmp_path / "pruned"), abs=1e-6)


def test_what_a_shape_keeps_is_a_view(pico: PicoMaker) -> None:
    checkpoint = Checkpoint.open(pico("llama"))
    have = sizes(checkpoint.family, checkpoint.config)
    resident = Resident(checkpoint, random_scores(checkpoint), score=Score(), merge_heads=False)
    own = {t.untyped_storage().data_ptr() for t in resident.model(have).parameters()}
    for changed in ({"hidden": 40, "ffn": 64, "layers": 2}, {"kv_heads": 1, "hidden": 48}):
        model = resident.model({**have, **changed})
        assert {p.untyped_storage().data_ptr() for p in model.parameters()} <= own


def test_the_order_of_shapes_does_not_matter(pico: PicoMaker) -> None:
    checkpoint = Checkpoint.open(pico("llama"))
    have = sizes(checkpoint.family, checkpoint.config)
    scores = random_scores(checkpoint)
    one = Resident(checkpoint, scores, score=Score(), merge_heads=True)
    other = Resident(checkpoint, scores, score=Score(), merge_heads=True)

    def losses(resident: Resident, order: list[int]) -> dict[int, float]:
        return {
            k: mean_loss(resident.model({**have, **SHAPES[k]}), WINDOWS, micro_batch=2)
            for k in order
        }

    order = list(range(len(SHAPES)))
    assert losses(one, order) == losses(other, order[::-1])
