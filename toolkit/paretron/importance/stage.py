"""The score stage: a model and calibration tokens in, a scores folder out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paretron.artifacts.manifest import Provenance
from paretron.artifacts.reader import Checkpoint
from paretron.artifacts.staging import staged
from paretron.data.store import TokenStore, sample_windows
from paretron.errors import Code, ParetronError, Problem
from paretron.importance.collect import documents_apart
from paretron.importance.picture import PICTURE, scores_page
from paretron.importance.score import OnEvent, score_windows
from paretron.importance.scores import Scores
from paretron.recipe import Calibration, Score
from paretron.workers.launch import launch, under_torchrun
from paretron.workers.world import World, joined_world

WORKER = "paretron.importance.worker"


@dataclass(frozen=True)
class Job:
    """The arguments of `score_model`, which explains them."""

    model: Path
    calibration: Path
    score: Score
    calibration_settings: Calibration
    block_sizes: tuple[int, ...]
    seed: int
    out: Path
    provenance: Provenance
    state: Path | None
    overwrite: bool

    def to_json(self) -> str:
        """All fields as JSON text; paths are made absolute."""
        return json.dumps(
            {
                "model": str(self.model.absolute()),
                "calibration": str(self.calibration.absolute()),
                "score": self.score.model_dump(mode="json"),
                "calibration_settings": self.calibration_settings.model_dump(mode="json"),
                "block_sizes": self.block_sizes,
                "seed": self.seed,
                "out": str(self.out.absolute()),
                "provenance": dataclasses.asdict(self.provenance),
                "state": self.state and str(self.state.absolute()),
                "overwrite": self.overwrite,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Job:
        """The inverse of `to_json`."""
        fields: dict[str, Any] = json.loads(text)
        return cls(
            model=Path(fields["model"]),
            calibration=Path(fields["calibration"]),
            score=Score.model_validate(fields["score"]),
            calibration_settings=Calibration.model_validate(fields["calibration_settings"]),
            block_sizes=tuple(fields["block_sizes"]),
            seed=fields["seed"],
            out=Path(fields["out"]),
            provenance=Provenance(**fields["provenance"]),
            state=fields["state"] and Path(fields["state"]),
            overwrite=fields["overwrite"],
        )


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
    state: Path | None = None,
    overwrite: bool = False,
    on_event: OnEvent,
) -> None:
    """Score every axis and layer on `samples` windows of a token store drawn by seed.

    `block_sizes` are the numbers of layers that students will lose; without any, lm_head is never
    run. In `state` lies what a run that was killed need not do again. With `score.processes` above
    1, torchrun is started, unless this process is one of a torchrun's already.
    Errors: INPUT_CORPUS, GATE_NONFINITE, USAGE, OPTIONAL_MISSING (a task without lm-eval), DEVICE
    (a process died), and those of loading the model.
    """
    job = Job(
        model=model,
        calibration=calibration,
        score=score,
        calibration_settings=calibration_settings,
        block_sizes=block_sizes,
        seed=seed,
        out=out,
        provenance=provenance,
        state=state,
        overwrite=overwrite,
    )
    if score.processes == 1 or under_torchrun():
        run_job(job, on_event=on_event)
        return
    launch(
        WORKER,
        job.to_json(),
        processes=score.processes,
        died=Problem(
            Code.DEVICE,
            "a scoring process died",
            where="score.processes",
            fix="the same command again; fewer processes or a smaller score.micro_batch if "
            "memory ran out",
        ),
        hands_on_stop=False,
        on_event=on_event,
    )


def run_job(job: Job, *, on_event: OnEvent) -> None:
    """Take part in a job as the only process, or as one of torchrun's."""
    checkpoint = Checkpoint.open(job.model)
    _refuse_too_long(checkpoint, job.calibration_settings.seq_len)
    with joined_world() as world:
        if not world.leads:
            _score(job, checkpoint, world, _silent)
            return
        with staged(job.out, provenance=job.provenance, overwrite=job.overwrite) as folder:
            scores = _score(job, checkpoint, world, on_event)
            scores.save(folder)
            (folder / PICTURE).write_text(scores_page(scores, job.score), "utf-8")


def _score(job: Job, checkpoint: Checkpoint, world: World, on_event: OnEvent) -> Scores:
    store = TokenStore.open(job.calibration)
    settings = job.calibration_settings
    windows = list(sample_windows(store, settings.samples, settings.seq_len, job.seed))
    if job.score.documents == "apart":
        windows = list(documents_apart(windows, eos_token_id=store.eos_token_id))
    return score_windows(
        checkpoint,
        windows,
        score=job.score,
        block_sizes=job.block_sizes,
        seed=job.seed,
        world=world,
        state=job.state,
        on_event=on_event,
    )


def _silent(kind: str, fields: Mapping[str, object]) -> None:
    """The events of the processes that do not lead."""


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
