"""The prune stage with compensation: checkpoint, scores and calibration tokens in, student out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from paretron.artifacts.jsonfile import dump
from paretron.artifacts.manifest import Provenance
from paretron.artifacts.reader import Checkpoint
from paretron.artifacts.staging import refuse_overlap, staged
from paretron.artifacts.tokenizer import check_tokenizer
from paretron.compensate.decide import decide
from paretron.compensate.figures import FIGURES, said
from paretron.compensate.samples import Samples, split_samples
from paretron.compensate.student import Student
from paretron.data.store import TokenStore, sample_windows
from paretron.errors import raise_all
from paretron.families import Sizes
from paretron.families import sizes as sizes_of
from paretron.importance.scores import Scores
from paretron.recipe import Calibration, Compensate, Prune, Score
from paretron.surgery.prune import prune as trim
from paretron.surgery.prune import same_model
from paretron.surgery.selection import Selection, choose

OnEvent = Callable[[str, Mapping[str, object]], None]


def prune_compensated(
    model: Path,
    scores: Path,
    calibration: Path,
    *,
    sizes: Sizes,
    prune: Prune,
    score: Score,
    compensate: Compensate,
    calibration_settings: Calibration,
    seed: int,
    out: Path,
    provenance: Provenance | Callable[[], Provenance],
    selection: Selection | None = None,
    overwrite: bool = False,
    on_event: OnEvent,
) -> None:
    """Cut a checkpoint to the target `sizes`, rotated and refitted as `compensate` says.

    A `selection` that was made in rounds is kept instead of the best by the scores.
    `calibration` is a token store. `out` is a Hugging Face repository with compensation.json: the
    loss on windows that nothing was fitted to, of the teacher, of plain trimming, of this student.
    Errors: RECIPE_TARGET, RECIPE_VALUE, RUN_MISMATCH, INPUT_CORPUS, and those of reading and
    writing.
    """
    refuse_overlap(out, model)
    checkpoint = Checkpoint.open(model)
    check_tokenizer(model, vocab=checkpoint.config["vocab_size"])
    loaded = Scores.load(scores)
    same_model(checkpoint, loaded)
    decision = decide(
        checkpoint.family,
        checkpoint.config,
        sizes=sizes_of(checkpoint.family, checkpoint.config),
        new=sizes,
        settings=compensate,
    )
    raise_all(decision.problems)
    if not decision.any:
        trim(
            model, scores, sizes=sizes, prune=prune, score=score, out=out, provenance=provenance,
            selection=selection, overwrite=overwrite, on_event=on_event,
        )  # fmt: skip
        return
    student = Student.of(
        checkpoint, selection or choose(loaded, sizes=sizes, score=score), sizes=sizes, prune=prune,
        decision=decision, ridge=compensate.ridge, seed=seed,
    )  # fmt: skip
    windows = calibration_windows(
        calibration, settings=calibration_settings, compensate=compensate, seed=seed
    )
    samples = split_samples(windows, micro_batch=score.micro_batch)
    digests: dict[str, str] = {}
    with staged(
        out, provenance=provenance, overwrite=overwrite, needed_bytes=student.nbytes,
        digests=digests,
    ) as folder:  # fmt: skip
        figures = student.write(folder, samples, digests=digests, on_event=on_event)
        if compensate.by_axis:
            figures["axes"] = losses_by_axis(
                checkpoint, loaded, samples, sizes=sizes, prune=prune, score=score,
                compensate=compensate, seed=seed, scratch=folder.parent, on_event=on_event,
            )  # fmt: skip
        dump(folder / FIGURES, figures | {"notes": list(decision.notes)})
        for message in said(figures):
            on_event("note", {"message": message})
        on_event("compensated", figures["loss"])


def losses_by_axis(
    checkpoint: Checkpoint,
    scores: Scores,
    samples: Samples,
    *,
    sizes: Sizes,
    prune: Prune,
    score: Score,
    compensate: Compensate,
    seed: int,
    scratch: Path,
    on_event: OnEvent,
) -> dict[str, dict[str, float]]:
    """The losses of students that lose only one of the axes each, by the name of the axis."""
    have = sizes_of(checkpoint.family, checkpoint.config)
    found = {}
    for axis in (a for a in have if sizes[a] != have[a]):
        on_event("note", {"message": f"measuring {axis} alone"})
        one = have | {axis: sizes[axis]}
        decision = decide(
            checkpoint.family, checkpoint.config, sizes=have, new=one, settings=compensate
        )
        student = Student.of(
            checkpoint, choose(scores, sizes=one, score=score), sizes=one, prune=prune,
            decision=decision, ridge=compensate.ridge, seed=seed,
        )  # fmt: skip
        found[axis] = student.losses(samples, scratch=scratch)
    return found


def calibration_windows(
    calibration: Path, *, settings: Calibration, compensate: Compensate, seed: int
) -> list[torch.Tensor]:
    """The windows of a token store by which students are compensated."""
    count = min(compensate.samples, settings.samples)
    return list(sample_windows(TokenStore.open(calibration), count, settings.seq_len, seed))
