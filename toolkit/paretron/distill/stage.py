"""The stage: a student's folder and tokens in, a trained Hugging Face repository out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from paretron.artifacts.config import family_and_config
from paretron.artifacts.held import held_parameters
from paretron.artifacts.jsonfile import dump
from paretron.artifacts.manifest import Provenance
from paretron.artifacts.models import load_model, save_model
from paretron.artifacts.reader import Checkpoint
from paretron.artifacts.staging import locked, refuse_existing, refuse_overlap, staged
from paretron.data.store import TokenStore
from paretron.distill.batches import Windows
from paretron.distill.divergences import divergence_of
from paretron.distill.history import History
from paretron.distill.job import Job, OnEvent
from paretron.distill.launch import launch
from paretron.distill.loop import Trainer
from paretron.distill.memory import memory_explained
from paretron.distill.objective import Objective, Teacher, predict
from paretron.distill.parallel import fast_bfloat16, shard, whole
from paretron.distill.preflight import check_before_training, check_same_tokenizer
from paretron.distill.state import StateFolder
from paretron.distill.states import StatesLoss
from paretron.errors import Code, ParetronError, Problem, raise_all
from paretron.families import sizes
from paretron.recipe import Distill, Training
from paretron.recipe.limits import loss_problems
from paretron.recipe.training import Loss
from paretron.workers.launch import under_torchrun
from paretron.workers.stop import StopRequest, stop_requests
from paretron.workers.world import World, joined_world

METRICS = "metrics.json"
_TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
}  # fmt: skip


def train(
    student: Path,
    train_tokens: Path,
    *,
    teacher: Path | None,
    settings: Training,
    seq_len: int,
    validation_tokens: Path | None,
    validation_seq_len: int,
    seed: int,
    out: Path,
    state: Path,
    provenance: Provenance,
    overwrite: bool = False,
    on_event: OnEvent,
) -> None:
    """Train `student` and publish it at `out` with metrics.json; again to continue.

    With a `teacher` the loss is that of `settings.loss` (distillation), without one cross entropy
    on the text (correction, pretraining). Checkpoints live in `state`. Weights are written in the
    dtype that the student came in. With `settings.processes` above 1, torchrun is started, unless
    this process is one of a torchrun's already.
    Events: "progress", "step", "eval", "note". Errors: OUT_EXISTS, OUT_OVERLAP, INPUT_TOKENIZER,
    GATE_PREFLIGHT, GATE_NONFINITE, RUN_MISMATCH, INPUT_MANIFEST, INTERRUPTED, DISK, DEVICE.
    """
    job = Job(
        student=student,
        train_tokens=train_tokens,
        teacher=teacher,
        settings=settings,
        seq_len=seq_len,
        validation_tokens=validation_tokens,
        validation_seq_len=validation_seq_len,
        seed=seed,
        out=out,
        state=state,
        provenance=provenance,
        overwrite=overwrite,
    )
    if settings.processes > 1 and not under_torchrun():
        launch(job, on_event=on_event)
    else:
        run_job(job, on_event=on_event)


def run_job(job: Job, *, on_event: OnEvent) -> None:
    """Take part in a job as the only process, or as one of torchrun's."""
    with joined_world() as world, stop_requests() as stop, _held(job, world):
        _check_inputs(job, world)
        with memory_explained(job.settings):
            trainer = _prepare(job, world, stop, on_event if world.leads else _silent)
            history = trainer.run()
        _publish(job, trainer, history)
        if stop.made:  # too late for this training, in time for what comes after it
            raise ParetronError(
                Problem(
                    Code.INTERRUPTED,
                    "stopped on request; this training is complete",
                    where=str(job.out),
                    fix="run the same command again to go on",
                )
            )


@contextmanager
def _held(job: Job, world: World) -> Iterator[None]:
    """Keep other trainings out of the state folder."""
    if not world.leads:
        yield
        return
    with locked(job.state / ".lock", what=str(job.state)):
        yield


def _check_inputs(job: Job, world: World) -> None:
    """What can be refused before any weight is read."""
    if world.leads:
        refuse_existing(job.out, overwrite=job.overwrite)
        for source in filter(None, (job.student, job.teacher, job.train_tokens)):
            refuse_overlap(job.out, source)
    if job.teacher is not None:
        check_same_tokenizer(job.student, job.teacher)
        own, other = (sizes(*family_and_config(f)) for f in (job.student, job.teacher))
        found = loss_problems(
            _loss(job.settings),
            vocab=own["vocab"],
            teacher_layers=other["layers"],
            layers=own["layers"],
        )
        raise_all(found)
    at_once = job.settings.micro_batch * world.size
    if job.settings.global_batch % at_once:
        raise ParetronError(
            Problem(
                Code.USAGE,
                f"global_batch {job.settings.global_batch} is not a multiple of micro_batch "
                f"{job.settings.micro_batch} x {world.size} processes",
                where="global_batch",
                fix="another global_batch or micro_batch, or fewer processes",
            )
        )


def _prepare(job: Job, world: World, stop: StopRequest, on_event: OnEvent) -> Trainer:
    """Models, windows and trainer; preflight included."""
    dtype = torch.bfloat16 if job.settings.dtype == "bfloat16" else torch.float32
    loss = _loss(job.settings)
    student = load_model(job.student).to(world.device)
    teacher, states = None, None
    if job.teacher is not None:
        model = load_model(job.teacher, dtype=dtype).to(world.device)
        states = StatesLoss.between(student, model, loss.states)
        teacher = Teacher(model, states.teacher_places if states else ())
    objective = Objective(student, divergence=divergence_of(loss), states=states)
    objective.to(world.device)
    vocab_size = student.config.vocab_size
    validation = None
    if job.validation_tokens is not None:
        store = TokenStore.open(job.validation_tokens)
        validation = Windows(store, job.validation_seq_len, vocab_size)
    windows = Windows(TokenStore.open(job.train_tokens), job.seq_len, vocab_size)
    if states is not None and teacher is not None:
        with torch.no_grad():
            ids = windows.batch([0]).to(world.device).input_ids
            own = predict(student, ids, states.student_places)
            states.start(own.states, teacher.predict(ids).states)
    shard(objective, world, dtype=dtype)
    trainer = Trainer(
        objective=objective,
        teacher=teacher,
        alpha=loss.states.alpha if loss.states else "dynamic",
        train_windows=windows,
        validation_windows=validation,
        settings=job.settings,
        seed=job.seed,
        world=world,
        state=StateFolder(
            job.state,
            job.result_settings() if world.leads else {},
            world,
            on_event,
            start_over=job.overwrite,
        ),
        stop=stop,
        on_event=on_event,
    )
    if dtype == torch.bfloat16 and not fast_bfloat16(world.device):
        on_event("note", {"message": "this CPU has no AMX: `dtype: float32` would be faster"})
    first = trainer.train_windows.batch(trainer.window_ids()[: job.settings.micro_batch])
    with trainer.autocast():
        check_before_training(objective, teacher, first.to(world.device), untrained=job.untrained)
    return trainer


def _publish(job: Job, trainer: Trainer, history: History) -> None:
    """Gather the weights and publish the repository once, by the leading process."""
    world = trainer.world
    source = Checkpoint.open(job.student)
    first = {h.name: h.parts[0][0] for h in held_parameters(source.family, source.config)}
    weights: dict[str, Tensor] = {}
    for name, parameter in trainer.objective.student.named_parameters():
        gathered = whole(parameter.detach())
        if world.leads:
            dtype = _TORCH_DTYPES[source.entries[first[name]].dtype]
            weights[name] = gathered.to(device="cpu", dtype=dtype)
    if world.leads:
        objective = "cross_entropy" if job.teacher is None else _loss(job.settings).logits
        with staged(job.out, provenance=job.provenance, overwrite=job.overwrite) as folder:
            save_model(weights, folder, config=source.config, companions=job.student)
            dump(folder / METRICS, {"schema": 1, "objective": objective} | history.as_json())
    world.from_leader(None)  # published


def _loss(settings: Training) -> Loss:
    return settings.loss if isinstance(settings, Distill) else Loss()


def _silent(kind: str, fields: object) -> None:
    """The events of the processes that do not lead."""
