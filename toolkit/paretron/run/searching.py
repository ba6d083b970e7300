"""How a search prunes and trains a candidate: as the run's own stages do, and resumable."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from paretron.artifacts.manifest import MANIFEST, Provenance
from paretron.families import Sizes
from paretron.plan.trial import shortened
from paretron.recipe import Distill, Search
from paretron.run.pruning import prune_to
from paretron.run.runner import Context
from paretron.search.halving import TrainedLoss


def search_of(context: Context) -> Search:
    """The search section of a stage's student."""
    search = context.recipe.students[str(context.stage.student)].search
    if search is None:
        raise ValueError(f"{context.stage.name} without a search section")
    return search


def trained_losses(context: Context, shapes: Mapping[str, Sizes]) -> TrainedLoss:
    """What distils a candidate on some tokens and says its validation loss; resumable."""

    def trained_loss(key: str, number: int, tokens: int) -> float:
        work = context.state / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}-{number}"
        context.on_event("note", {"message": f"round {number + 1}: {key}"})
        pruned, trained = work / "pruned", work / "trained"
        if not (pruned / MANIFEST).is_file():
            prune_to(
                context, shapes[key], out=pruned, provenance=_provenance(context, "prune", key)
            )
        if not (trained / MANIFEST).is_file():
            seq_len = context.recipe.data.train.seq_len
            settings = shortened(context.recipe.distill, tokens, seq_len=seq_len)
            _distil(context, key, pruned, trained, settings)
        loss = final_loss(trained)
        shutil.rmtree(work)
        return loss

    return trained_loss


def _distil(context: Context, key: str, pruned: Path, trained: Path, settings: Distill) -> None:
    from paretron.distill.stage import train

    texts = context.recipe.data
    train(
        pruned,
        context.folders["data"] / "train",
        teacher=context.folders["model"],
        settings=settings,
        seq_len=texts.train.seq_len,
        validation_tokens=context.folders["data"] / "validation",
        validation_seq_len=texts.validation.seq_len,
        seed=context.recipe.seed,
        out=trained,
        state=trained.with_name("state"),
        provenance=_provenance(context, "distill", key),
        apart=texts.train.documents == "apart",
        on_event=context.on_event,
    )


def final_loss(trained: Path) -> float:
    """The validation loss at the end of a training, in nats a token."""
    from paretron.distill.stage import METRICS

    metrics = json.loads((trained / METRICS).read_text("utf-8"))
    return float(metrics["validation"][-1]["loss"])


def _provenance(context: Context, kind: str, key: str) -> Provenance:
    mine = context.provenance
    settings = {**mine.settings, "candidate": key}
    return Provenance(
        kind=kind, parents=mine.parents, settings=settings, seed=mine.seed, stamp=mine.stamp
    )
