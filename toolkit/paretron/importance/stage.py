"""The score stage: a model and calibration tokens in, a scores folder out."""

from __future__ import annotations

from pathlib import Path

from paretron.artifacts.manifest import Provenance
from paretron.artifacts.reader import Checkpoint
from paretron.artifacts.staging import staged
from paretron.data.store import TokenStore, sample_windows
from paretron.errors import Code, ParetronError, Problem
from paretron.importance.score import OnEvent, score_windows
from paretron.recipe import Calibration, Score


def score_model(
    model: Path,
    calibration: Path,
    *,
    score: Score,
    calibration_settings: Calibration,
    block_sizes: tuple[int, ...],
    seed: int,
    out: Path,
    provenance: Provenance,
    overwrite: bool = False,
    on_event: OnEvent,
) -> None:
    """Score every axis and layer on `samples` windows of a token store drawn by seed.

    `block_sizes` are the numbers of layers that students will lose; without any, lm_head is never
    run. Errors: INPUT_CORPUS, GATE_NONFINITE, and those of loading the model.
    """
    checkpoint = Checkpoint.open(model)
    _refuse_too_long(checkpoint, calibration_settings.seq_len)
    with staged(out, provenance=provenance, overwrite=overwrite) as folder:
        windows = sample_windows(
            TokenStore.open(calibration),
            calibration_settings.samples,
            calibration_settings.seq_len,
            seed,
        )
        scores = score_windows(
            checkpoint,
            list(windows),
            score=score,
            block_sizes=block_sizes,
            seed=seed,
            on_event=on_event,
        )
        scores.save(folder)


def _refuse_too_long(checkpoint: Checkpoint, seq_len: int) -> None:
    longest = checkpoint.config.get("max_position_embeddings")
    if isinstance(longest, int) and seq_len > longest:
        raise ParetronError(
            Problem(
                Code.INPUT_CORPUS,
                f"windows of {seq_len} tokens, but the model's context has {longest}",
                where="data.calibration.seq_len",
                fix=f"at most {longest}",
            )
        )
