"""Students of pico models, compensated in one call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from paretron.artifacts.models import load_model
from paretron.artifacts.reader import Checkpoint
from paretron.compensate.decide import decide
from paretron.compensate.stage import Student, split_samples
from paretron.families import sizes
from paretron.recipe import Compensate, Prune, Score
from paretron.surgery.selection import choose
from picoscores import random_scores


def windows(count: int = 8, length: int = 24, *, seed: int = 5) -> list[torch.Tensor]:
    """Random tokens, the same every time."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(3, 300, (count, length), generator=generator))


def compensated(
    model: Path,
    folder: Path,
    *,
    prune: Prune | None = None,
    count: int = 8,
    new: dict[str, int] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Write a student of `model` with the sizes `new`; returns its figures."""
    checkpoint = Checkpoint.open(model)
    have = sizes(checkpoint.family, checkpoint.config)
    wanted = have | (new or {})
    chosen = Compensate(**settings)
    decision = decide(checkpoint.family, checkpoint.config, sizes=have, new=wanted, settings=chosen)
    assert not decision.problems
    selection = choose(random_scores(checkpoint), sizes=wanted, score=Score())
    student = Student.of(
        checkpoint,
        selection,
        sizes=wanted,
        prune=prune or Prune(),
        decision=decision,
        ridge=chosen.ridge,
        seed=0,
    )
    folder.mkdir(parents=True)
    return student.write(folder, split_samples(windows(count), micro_batch=4))


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    """What a checkpoint computes on a fixed prompt, fp32."""
    out: torch.Tensor = load_model(folder)(torch.stack(windows(2, seed=9)), use_cache=False).logits
    return out
