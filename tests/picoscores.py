"""Scores without a forward pass, and pruning in one call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from paretron.artifacts.reader import Checkpoint
from paretron.families import sizes
from paretron.importance.scores import DepthLosses, ScoredAxis, Scores, ScoresInfo
from paretron.importance.statistics import AxisStatistics
from paretron.importance.taps import find_taps
from paretron.recipe import Prune, Score
from paretron.surgery.prune import write_pruned
from paretron.surgery.selection import Selection, choose

IDS = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(11))


def random_scores(checkpoint: Checkpoint, *, seed: int = 0) -> Scores:
    """Scores of one imaginary sample, complete for every depth."""
    generator = torch.Generator().manual_seed(seed)
    size = sizes(checkpoint.family, checkpoint.config)
    taps = find_taps(checkpoint.family, checkpoint.config)
    layers = size["layers"]
    axes, statistics = {}, {}
    for axis in dict.fromkeys(t.axis for t in taps):
        own = [t for t in taps if t.axis == axis]
        axes[axis] = ScoredAxis(taps=tuple(t.name for t in own), units=own[0].units)
        values = torch.rand((len(own), 3, own[0].units), generator=generator, dtype=torch.float64)
        statistics[axis] = AxisStatistics(1, values, values.square())

    def per_block(n: int) -> tuple[float, ...]:
        return tuple(torch.rand(layers - n + 1, generator=generator).tolist())

    order = torch.randperm(layers, generator=generator).tolist()
    info = ScoresInfo(
        model_type=checkpoint.family.model_type,
        sizes=size,
        model_identity=None,
        samples=1,
        tokens=1,
        seq_len=1,
        seed=seed,
        axes=axes,
        influence={n: per_block(n) for n in range(1, layers)},
        losses=DepthLosses(
            samples=1,
            baseline=0.0,
            blocks={n: per_block(n) for n in range(1, layers)},
            greedy=tuple((layer, float(k)) for k, layer in enumerate(order[:-1])),
        ),
    )
    return Scores(info, statistics)


def prune_to(
    model: Path,
    folder: Path,
    *,
    merge_heads: bool = False,
    scores: Scores | None = None,
    **new: int,
) -> Selection:
    """Prune `model` into `folder` by random scores; axes that are not named stay."""
    checkpoint = Checkpoint.open(model)
    size = sizes(checkpoint.family, checkpoint.config) | new
    selection = choose(scores or random_scores(checkpoint), sizes=size, score=Score())
    folder.mkdir(parents=True, exist_ok=True)
    write_pruned(checkpoint, selection, folder, sizes=size, prune=Prune(merge_heads=merge_heads))
    return selection


def gone(kept: Sequence[int] | torch.Tensor, total: int) -> list[int]:
    """The numbers below `total` that are not kept."""
    here = {int(k) for k in kept}
    return [k for k in range(total) if k not in here]
