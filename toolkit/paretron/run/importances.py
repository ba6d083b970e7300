"""A summary of a scores folder that a page can draw: kilobytes, whatever the model's size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from paretron.importance.scores import Scores
from paretron.recipe import Score

COLUMNS = 24  # of a heat map: means of equal parts of the units, the most important first
ROWS = 96  # places beyond that are thinned evenly


def importance_summary(folder: Path, score: Score) -> dict[str, Any]:
    """The `importance` of a report, aggregated as `score` says.

    Layers: how much loss (or accuracy) each one is worth, how much it changes its input. Axes: for
    each place where units were observed their values by rank, as parts of the axis' largest.
    """
    scores = Scores.load(folder)
    return {
        "criterion": scores.info.criterion,
        "samples": scores.info.samples,
        "tokens": scores.info.tokens,
        "layers": [
            {"metric": metric, "values": [_short(v) for v in values]}
            for metric, values in _layers(scores)
        ],
        "axes": [_axis(scores, axis, score) for axis in scores.info.axes],
    }


def _layers(scores: Scores) -> Iterator[tuple[str, list[float]]]:
    info = scores.info
    if info.losses is not None and (without := info.losses.blocks.get(1)):
        yield (
            "loss without it, above the whole model's",
            [v - info.losses.baseline for v in without],
        )
    if info.accuracies is not None and (without := info.accuracies.blocks.get(1)):
        lost = [info.accuracies.baseline - v for v in without]
        yield f"{info.accuracies.task}: accuracy lost without it", lost
    if single := info.influence.get(1):
        yield "change of the residual stream (1 - cosine)", list(single)
    for metric, values in info.layer_values.items():
        yield metric, list(values)


def _axis(scores: Scores, axis: str, score: Score) -> dict[str, Any]:
    values = scores.places(axis, batch=score.batch, sequence=score.sequence)
    names = list(scores.info.axes[axis].taps)
    if values.shape[0] != len(names):  # a criterion may value an axis over the whole model
        names = [axis] * values.shape[0]
    values = values.flatten(1)  # neurons of experts: all of a layer together
    units = values.shape[1]
    kept = _thinned(values.shape[0])
    ranked = values[kept].sort(dim=1, descending=True).values
    if units > COLUMNS:
        parts = ranked.tensor_split(COLUMNS, dim=1)
        ranked = torch.stack([p.mean(1) for p in parts], dim=1)
    most = ranked.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    return {
        "axis": axis,
        "units": units,
        "places": [names[k] for k in kept],
        "values": [[_short(v) for v in row] for row in (ranked / most).tolist()],
    }


def _thinned(rows: int) -> list[int]:
    if rows <= ROWS:
        return list(range(rows))
    return [round(i * (rows - 1) / (ROWS - 1)) for i in range(ROWS)]


def _short(value: float) -> float:
    """Four digits: enough to draw, and small to write."""
    return float(f"{value:.4g}")
