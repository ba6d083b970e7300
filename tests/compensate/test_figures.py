"""What is said about a student right after pruning, whole and by axis."""

from __future__ import annotations

from pathlib import Path

import pytest

from makers import PicoMaker
from paretron.artifacts.reader import Checkpoint
from paretron.compensate.figures import said
from paretron.compensate.stage import losses_by_axis
from paretron.families import sizes
from paretron.recipe import Compensate, Prune, Score
from picocompensated import compensated, samples_of
from picoscores import random_scores

NEW = {"hidden": 48, "ffn": 40}


def test_every_axis_alone_is_the_student_that_loses_only_it(
    pico: PicoMaker, tmp_path: Path
) -> None:
    model = pico("llama")
    checkpoint = Checkpoint.open(model)
    messages = []
    found = losses_by_axis(
        checkpoint, random_scores(checkpoint), samples_of(4),
        sizes=sizes(checkpoint.family, checkpoint.config) | NEW, prune=Prune(), score=Score(),
        compensate=Compensate(), seed=0, scratch=tmp_path,
        on_event=lambda kind, fields: messages.append(fields["message"]),
    )  # fmt: skip
    assert messages == ["measuring hidden alone", "measuring ffn alone"]
    for axis, loss in found.items():
        alone = compensated(model, tmp_path / axis, new={axis: NEW[axis]}, count=4)["loss"]
        assert loss == pytest.approx({k: alone[k] for k in ("plain", "compensated")}, abs=1e-6)


def test_losses_are_said_for_the_whole_and_for_each_axis() -> None:
    whole, axis = said(
        {
            "loss": {"teacher": 1.0, "plain": 3.0, "compensated": 2.0},
            "windows": {"fit": 28, "held": 4},
            "axes": {"q_per_kv": {"plain": 1.5, "compensated": 1.25}},
        }
    )
    assert "4 calibration windows that nothing was fitted to" in whole
    assert whole.endswith("teacher 1.000, trimmed 3.000, compensated 2.000")
    assert axis == "query heads alone: trimmed 1.500, compensated 1.250"
