"""Scoring a checkpoint on samples in memory: one pass for widths and influence, then depth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from paretron.artifacts.config import DTYPE_NAMES
from paretron.artifacts.manifest import MANIFEST, identity
from paretron.artifacts.models import load_model
from paretron.artifacts.reader import Checkpoint
from paretron.families import sizes
from paretron.importance.collect import batches_of, observe
from paretron.importance.depth import greedy_removal, removal_losses
from paretron.importance.executor import Batch, LayerStack
from paretron.importance.scores import DepthLosses, ScoredAxis, Scores, ScoresInfo
from paretron.importance.taps import find_taps
from paretron.recipe import Score

OnEvent = Callable[[str, Mapping[str, object]], None]


def score_windows(
    checkpoint: Checkpoint,
    windows: Sequence[torch.Tensor],
    *,
    score: Score,
    block_sizes: Sequence[int] = (),
    seed: int = 0,
    on_event: OnEvent = lambda kind, fields: None,
) -> Scores:
    """Score a checkpoint on samples that are in memory, each a vector of token ids.

    On a CPU the model runs in fp32, on an accelerator in its own dtype; statistics are fp64.
    """
    stack = _load(checkpoint)
    progress = _Progress(on_event, total=len(windows))
    observed = observe(
        stack,
        checkpoint.config,
        progress.over(batches_of(windows, score.micro_batch)),
        block_sizes=(1, *block_sizes),
    )
    losses = None
    if block_sizes and score.depth.metric == "loss":
        losses = _depth_losses(stack, windows[: score.depth.samples], score, block_sizes, on_event)
    return Scores(
        ScoresInfo(
            model_type=checkpoint.family.model_type,
            sizes=sizes(checkpoint.family, checkpoint.config),
            model_identity=known_identity(checkpoint.path),
            samples=len(windows),
            tokens=observed.tokens,
            seq_len=max(len(w) for w in windows),
            seed=seed,
            axes=_scored_axes(checkpoint),
            influence=observed.influence(),
            losses=losses,
        ),
        observed.axes,
    )


def known_identity(folder: Path) -> str | None:
    """What an artifact is known by, or None for a folder without a manifest.

    Hashing the weights of a downloaded checkpoint would cost a second read of all of them.
    """
    return identity(folder) if (folder / MANIFEST).is_file() else None


def _depth_losses(
    stack: LayerStack,
    windows: Sequence[torch.Tensor],
    score: Score,
    block_sizes: Sequence[int],
    on_event: OnEvent,
) -> DepthLosses:
    """Blocks of all sizes asked for, or single layers and then the greedy order of removal."""
    batches = list(batches_of(windows, score.micro_batch))
    contiguous = score.depth.contiguous
    losses = removal_losses(
        stack,
        _Progress(on_event, total=len(windows), unit="windows of depth").over(batches),
        block_sizes=(1, *block_sizes) if contiguous else (1,),
    )
    order = () if contiguous else greedy_removal(stack, batches, rounds=max(block_sizes))
    return DepthLosses(
        samples=len(windows), baseline=losses.baseline, blocks=losses.blocks, greedy=order
    )


def _load(checkpoint: Checkpoint) -> LayerStack:
    if not torch.cuda.is_available():
        return LayerStack(load_model(checkpoint.path, dtype=torch.float32), checkpoint.family)
    model = load_model(checkpoint.path, dtype=getattr(torch, DTYPE_NAMES[checkpoint.dtype]))
    torch.nn.Module.to(model, torch.device("cuda"))
    return LayerStack(model, checkpoint.family)


def _scored_axes(checkpoint: Checkpoint) -> dict[str, ScoredAxis]:
    taps = find_taps(checkpoint.family, checkpoint.config)
    return {
        axis: ScoredAxis(
            taps=tuple(t.module for t in taps if t.axis == axis),
            units=next(t.units for t in taps if t.axis == axis),
        )
        for axis in dict.fromkeys(t.axis for t in taps)
    }


class _Progress:
    """Counts samples as their batches are taken."""

    def __init__(self, on_event: OnEvent, *, total: int, unit: str = "samples") -> None:
        self._on_event = on_event
        self._total = total
        self._unit = unit

    def over(self, batches: Iterator[Batch] | Sequence[Batch]) -> Iterator[Batch]:
        done = 0
        for batch in batches:
            yield batch
            done += len(batch.lengths)
            fields = {"done": done, "total": self._total, "unit": self._unit}
            self._on_event("progress", fields)
