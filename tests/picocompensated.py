"""Students of pico models, compensated in one call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from paretron.artifacts.models import load_model
from paretron.artifacts.reader import Checkpoint
from paretron.compensate.decide import Decision, decide
from paretron.compensate.model import StudentStack
from paretron.compensate.samples import Samples, split_samples
from paretron.compensate.student import Student
from paretron.compensate.trimmed import Trimmed
from paretron.compensate.walk import Walk
from paretron.families import sizes
from paretron.importance.collect import batches_of
from paretron.importance.states import HiddenStates
from paretron.importance.stream import StreamedStack
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
    return student.write(folder, samples_of(count))


def samples_of(count: int) -> Samples:
    """What `compensated` fits to and measures on."""
    return split_samples(windows(count), micro_batch=4)


def stream_errors(
    model: Path, *, ridge: float | None, count: int, length: int, **new: int
) -> list[float]:
    """What the student's stream misses after every layer, on the very samples it is fitted to."""
    checkpoint = Checkpoint.open(model)
    have = sizes(checkpoint.family, checkpoint.config)
    selection = choose(random_scores(checkpoint), sizes=have | new, score=Score())
    student = Student.of(
        checkpoint,
        selection,
        sizes=have | new,
        prune=Prune(merge_heads=False),
        decision=Decision(refit=ridge is not None),
        ridge=ridge or 1.0,
        seed=0,
    )
    batches = tuple(batches_of(windows(count, length), 4))
    with HiddenStates() as states:
        teacher = StreamedStack(checkpoint, dtype=torch.float32, device=torch.device("cpu"))
        stack = StudentStack(student.servable, device=teacher.device)
        trimmed = Trimmed(checkpoint, selection, student.config, basis=None, merge_heads=False)
        samples = Samples(batches, batches)
        walk = Walk(teacher, stack, trimmed, samples, states, ridge=ridge)
        assert sum(1 for _ in walk.layers()) == 2 * len(walk.errors)
    return walk.errors


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    """What a checkpoint computes on a fixed prompt, fp32."""
    out: torch.Tensor = load_model(folder)(torch.stack(windows(2, seed=9)), use_cache=False).logits
    return out
