"""Iterative importance: scores taken again on the way down, composed to one selection."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from paretron.artifacts.manifest import MANIFEST, Provenance
from paretron.artifacts.reader import Checkpoint
from paretron.artifacts.staging import staged
from paretron.distill.job import store_identity
from paretron.families import Sizes
from paretron.families import sizes as sizes_of
from paretron.importance.score import (
    known_identity,
    model_known_by,
    task_sha256,
    versions_of_scores,
)
from paretron.importance.scores import Scores
from paretron.importance.stage import score_model
from paretron.recipe import Calibration, Prune, Score
from paretron.run.events import OnEvent
from paretron.surgery.prune import same_model, write_pruned
from paretron.surgery.rounds import composed, round_sizes
from paretron.surgery.selection import Selection, choose


def select_in_rounds(
    model: Path,
    scores: Path,
    calibration: Path,
    *,
    sizes: Sizes,
    score: Score,
    calibration_settings: Calibration,
    seed: int,
    state: Path,
    on_event: OnEvent,
) -> Selection:
    """What stays of a model that is cut to the target `sizes` in `score.rounds` steps.

    The first step goes by `scores`; before every further one the model is trimmed to where it has
    come into `state`, scored there, and removed. Every step cuts the original model, so nothing of
    it is cut twice. Finished scores in `state` are not taken again.
    """
    checkpoint = Checkpoint.open(model)
    have = sizes_of(checkpoint.family, checkpoint.config)
    steps = round_sizes(
        checkpoint.family, checkpoint.config, have=have, want=sizes, score=score
    )  # fmt: skip
    loaded = Scores.load(scores)
    same_model(checkpoint, loaded)
    known = {
        "model": model_known_by(checkpoint),
        "scores": known_identity(scores),
        "steps": steps,
        "score": score.model_dump(mode="json"),
        "calibration": calibration_settings.model_dump(mode="json"),
        "tokens": store_identity(calibration),
        "task": task_sha256(score),
        "versions": versions_of_scores(),
        "seed": seed,
    }
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
    selection = choose(loaded, sizes=steps[0], score=score)
    for number in range(1, len(steps)):
        on_event("note", {"message": f"round {number + 1} of {len(steps)}"})
        place = state / f"{digest}-{number}"
        scored, trimmed = place / "scores", place / "model"
        if not (scored / MANIFEST).is_file():
            if not (trimmed / MANIFEST).is_file():
                with staged(trimmed, provenance=Provenance(kind="prune")) as folder:
                    write_pruned(
                        checkpoint, selection, folder, sizes=steps[number - 1],
                        prune=Prune(merge_heads=False),
                    )  # fmt: skip
            lost = steps[number - 1]["layers"] - steps[number]["layers"]
            score_model(
                trimmed,
                calibration,
                score=score,
                calibration_settings=calibration_settings,
                block_sizes=(lost,) if lost else (),
                seed=seed,
                out=scored,
                provenance=Provenance(kind="score"),
                state=place / "state",
                on_event=on_event,
            )
        for spent in (trimmed, place / "state"):
            shutil.rmtree(spent, ignore_errors=True)
        chosen = choose(Scores.load(scored), sizes=steps[number], score=score)
        selection = composed(selection, chosen, have=have)
    return selection
