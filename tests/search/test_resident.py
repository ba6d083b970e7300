"""Ranking on slices of one resident model: equal to really pruning, and without copies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from makers import PicoMaker
from paretron.artifacts.models import load_model
from paretron.artifacts.reader import Checkpoint
from paretron.compensate.decide import Decision, decide
from paretron.compensate.samples import Samples
from paretron.compensate.student import Student
from paretron.families import family_of, sizes
from paretron.importance.collect import batches_of
from paretron.recipe import Compensate, Prune, Score
from paretron.search.resident import Resident, mean_loss, pruned_models
from paretron.search.rotated import principal_rotation
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

CALIBRATION = tuple(batches_of(WINDOWS, 2))


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
    models = pruned_models(
        checkpoint, random_scores(checkpoint), score=Score(), prune=Prune(),
        decision=Decision(), calibration=[],
    )  # fmt: skip
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


def rotated_loss(checkpoint: Checkpoint, size: dict[str, int], folder: Path) -> float:
    """Of the student that is rotated and not refitted, made as students are."""
    have = sizes(checkpoint.family, checkpoint.config)
    settings = Compensate(rotate="auto", refit=False)
    decision = decide(checkpoint.family, checkpoint.config, sizes=have, new=size, settings=settings)
    selection = choose(random_scores(checkpoint), sizes=size, score=Score())
    student = Student.of(
        checkpoint, selection, sizes=size, prune=Prune(dtype="float32"), decision=decision,
        ridge=settings.ridge, seed=0,
    )  # fmt: skip
    folder.mkdir()
    student.write(folder, Samples(CALIBRATION, CALIBRATION))
    return mean_loss(load_model(folder), WINDOWS, micro_batch=2)


@pytest.mark.parametrize(
    "family", [f for f in PICO_FAMILIES if family_of({"model_type": f}).norm == "rms"]
)
def test_rotated_slices_rank_as_rotated_students(
    family: str, pico: PicoMaker, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(pico(family))
    have = sizes(checkpoint.family, checkpoint.config)
    decided = decide(
        checkpoint.family, checkpoint.config, sizes=have, new={**have, "hidden": 32},
        settings=Compensate(),
    )  # fmt: skip
    models = pruned_models(
        checkpoint, random_scores(checkpoint), score=Score(), prune=Prune(merge_heads=False),
        decision=decided, calibration=CALIBRATION,
    )  # fmt: skip
    whole = mean_loss(load_model(checkpoint.path), WINDOWS, micro_batch=2)
    assert mean_loss(models.model(have), WINDOWS, micro_batch=2) == pytest.approx(whole, abs=1e-4)
    if not decided.rotate:
        return
    # The student's norms are fitted to its own stream, which is almost the teacher's at this size.
    size = {**have, "hidden": have["hidden"] - 1}
    wanted = rotated_loss(checkpoint, size, tmp_path / "student")
    assert mean_loss(models.model(size), WINDOWS, micro_batch=2) == pytest.approx(wanted, abs=2e-3)


def test_a_norms_factor_is_the_least_squares_one(pico: PicoMaker) -> None:
    checkpoint = Checkpoint.open(pico("llama"))
    model = load_model(checkpoint.path)
    rotation = principal_rotation(model, CALIBRATION)
    size = model.config.hidden_size
    torch.testing.assert_close(rotation.basis @ rotation.basis.T, torch.eye(size))
    # What the first norm reads is the embedding.
    ids = torch.cat(
        [ids[:n] for b in CALIBRATION for ids, n in zip(b.ids_BT, b.lengths, strict=True)]
    )
    x = model.get_input_embeddings()(ids).double().detach()
    x = x / x.square().mean(-1, keepdim=True).sqrt()
    for kept in (size, size // 2, 1):
        y = x @ rotation.basis[:kept].double().T
        z = y / y.square().mean(-1, keepdim=True).sqrt()
        wanted = (z * y).sum() / z.square().sum()
        found = rotation.factors["model.layers.0.input_layernorm.weight"][kept - 1]
        assert float(found) == pytest.approx(float(wanted), rel=1e-5)
    assert all(float(f[-1]) == pytest.approx(1) for f in rotation.factors.values())


def test_rotated_slices_are_views(pico: PicoMaker) -> None:
    checkpoint = Checkpoint.open(pico("llama"))
    have = sizes(checkpoint.family, checkpoint.config)
    resident = Resident(
        checkpoint, random_scores(checkpoint), score=Score(), merge_heads=False,
        rotation=principal_rotation(load_model(checkpoint.path), CALIBRATION),
    )  # fmt: skip

    def matrices(size: dict[str, int]) -> set[int]:
        parameters = resident.model(size).parameters()
        return {p.untyped_storage().data_ptr() for p in parameters if p.dim() > 1}

    assert matrices({**have, "hidden": 40, "ffn": 64, "layers": 2}) <= matrices(have)


@pytest.mark.parametrize(("refit", "merges"), [("auto", False), (False, True)])
def test_heads_merge_where_students_do(refit: object, merges: bool, pico: PicoMaker) -> None:
    checkpoint = Checkpoint.open(pico("llama"))
    have = sizes(checkpoint.family, checkpoint.config)
    size = {**have, "q_per_kv": 1}
    settings = Compensate.model_validate({"refit": refit})
    decided = decide(checkpoint.family, checkpoint.config, sizes=have, new=size, settings=settings)
    scores = random_scores(checkpoint)
    models = pruned_models(
        checkpoint, scores, score=Score(), prune=Prune(), decision=decided, calibration=[]
    )
    wanted = Resident(checkpoint, scores, score=Score(), merge_heads=merges)
    other = Resident(checkpoint, scores, score=Score(), merge_heads=not merges)
    losses = [mean_loss(m.model(size), WINDOWS, micro_batch=2) for m in (models, wanted, other)]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]
