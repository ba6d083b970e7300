"""The stage: a student's folder and tokens in, a trained Hugging Face repository out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from paretron.artifacts.config import family_and_config
from paretron.artifacts.jsonfile import dump
from paretron.artifacts.manifest import Provenance
from paretron.artifacts.models import load_model
from paretron.artifacts.staging import locked, refuse_existing, refuse_overlap, staged
from paretron.artifacts.tokenizer import rows_with_tokens
from paretron.data.store import TokenStore
from paretron.distill.adapters import choose_trained
from paretron.distill.batches import Windows
from paretron.distill.capture.cache import Cache, is_capture
from paretron.distill.capture.teacher import CapturedTeacher, check_capture
from paretron.distill.correction import CorrectedTeacher, Correction
from paretron.distill.divergences import divergence_of
from paretron.distill.history import History
from paretron.distill.job import Job, OnEvent, labels_alone
from paretron.distill.launch import launch
from paretron.distill.loop import Trainer
from paretron.distill.memory import memory_explained
from paretron.distill.meter import peak_memory_bytes
from paretron.distill.objective import Objective, Teacher, Teaches, predict
from paretron.distill.parallel import (
    check_devices,
    checkpoint_layers,
    compile_layers,
    compiler_explained,
    fast_bfloat16,
    place,
    place_teacher,
    shard,
)
from paretron.distill.preflight import check_before_training, check_same_tokenizer
from paretron.distill.publishing import Trained
from paretron.distill.schedule import Schedule
from paretron.distill.stall import stall_watch
from paretron.distill.state import StateFolder
from paretron.distill.states import StatesLoss
from paretron.errors import Code, ParetronError, Problem, raise_all
from paretron.families import parameter_counts, sizes
from paretron.families.costs import ADAM_BYTES_PER_PARAM
from paretron.recipe import Correct, Distill, Training
from paretron.recipe.limits import loss_problems
from paretron.recipe.training import CORRECTED, Loss
from paretron.workers.launch import under_torchrun
from paretron.workers.stop import StopRequest, stop_requests
from paretron.workers.world import World, joined_world

METRICS = "metrics.json"
_AFTER_STALL_S = 60


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
    apart: bool = False,
    correct: Correct | None = None,
    on_event: OnEvent,
) -> None:
    """Train `student` and publish it at `out` with metrics.json; again to continue.

    With a `teacher` the loss is that of `settings.loss` (distillation). Without one, or where that
    loss asks none, it is cross entropy on the text (correction, pretraining, retraining).
    Checkpoints live in `state`. Weights are written in the dtype that the student came in. With
    `settings.processes` above 1, torchrun is started, unless this process is one of a torchrun's
    already. With `apart`, documents within a window are texts of their own. With `correct`, whose
    mode is parallel, the student learns from a copy of the teacher that is corrected meanwhile and
    published below `out`, in `teacher`.
    Events: "progress", "step", "eval", "checkpoint", "note". Errors: OUT_EXISTS, OUT_OVERLAP,
    INPUT_TOKENIZER, GATE_PREFLIGHT, GATE_NONFINITE, RUN_MISMATCH, INPUT_MANIFEST, INTERRUPTED,
    DISK, DEVICE, MEMORY.
    """
    job = Job(
        student=student,
        train_tokens=train_tokens,
        teacher=None if labels_alone(settings) else teacher,
        settings=settings,
        seq_len=seq_len,
        validation_tokens=validation_tokens,
        validation_seq_len=validation_seq_len,
        seed=seed,
        out=out,
        state=state,
        provenance=provenance,
        overwrite=overwrite,
        apart=apart,
        correct=correct,
    )
    if settings.processes > 1 and not under_torchrun():
        launch(job, on_event=on_event)
    else:
        run_job(job, on_event=on_event)


def run_job(job: Job, *, on_event: OnEvent) -> None:
    """Take part in a job as the only process, or as one of torchrun's."""
    stall_s = job.settings.stall_timeout_s
    # The watch is the first to speak: it says where every process was.
    joined = joined_world(
        timeout_s=stall_s + _AFTER_STALL_S, tensor_parallel=job.settings.tensor_parallel
    )
    with joined as world, stop_requests() as stop, _held(job, world):
        _check_inputs(job, world)
        trained = [job.student] if job.correct is None else [job.student, job.teacher]
        params = sum(parameter_counts(*family_and_config(m)).total for m in trained if m)
        with (
            stall_watch(job.state, world, timeout_s=stall_s) as alive,
            memory_explained(
                job.settings,
                state_bytes=ADAM_BYTES_PER_PARAM * params // world.size,
                peak_bytes=lambda: peak_memory_bytes(world.device),
            ),
            compiler_explained(job.settings),
        ):
            trainer = _prepare(job, world, stop, on_event if world.leads else _silent)
            trainer.objective.register_forward_pre_hook(lambda *_: alive())
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
    if job.teacher is not None and is_capture(job.teacher):
        check_capture(
            job.teacher,
            student=job.student,
            tokens=job.train_tokens,
            seq_lens={leg.seq_len for leg in Schedule.of(job.settings, seq_len=job.seq_len).legs},
            apart=job.apart,
            loss=_loss(job.settings),
            hashes=world.leads,
        )
    elif job.teacher is not None:
        check_same_tokenizer(job.student, job.teacher)
        own, other = (sizes(*family_and_config(f)) for f in (job.student, job.teacher))
        found = loss_problems(
            _loss(job.settings),
            vocab=own["vocab"],
            teacher_layers=other["layers"],
            layers=own["layers"],
            apart=job.apart,
        )
        raise_all(found)
    if job.correct is not None and (job.teacher is None or is_capture(job.teacher)):
        raise ParetronError(
            Problem(
                Code.RECIPE_VALUE,
                "in mode parallel a teacher is corrected while it is asked: here is none to train",
                where="correct.mode",
                fix="name the teacher's checkpoint, not what was captured of it",
            )
        )
    asked = [job.teacher] if job.teacher is not None and not is_capture(job.teacher) else []
    check_devices(job.settings, [job.student, *asked], world, apart=job.apart)
    for leg in Schedule.of(job.settings, seq_len=job.seq_len).legs:
        if leg.global_batch % (leg.micro_batch * world.shares):
            raise ParetronError(
                Problem(
                    Code.USAGE,
                    f"global_batch {leg.global_batch} is not a multiple of micro_batch "
                    f"{leg.micro_batch} x {world.shares} shares of the data, one in each of "
                    f"{world.size} processes or group of them",
                    where="global_batch",
                    fix="another global_batch or micro_batch, or fewer processes",
                )
            )


def _prepare(job: Job, world: World, stop: StopRequest, on_event: OnEvent) -> Trainer:
    """Models, windows and trainer; preflight included."""
    dtype = torch.bfloat16 if job.settings.dtype == "bfloat16" else torch.float32
    loss = _loss(job.settings)
    student = load_model(job.student, attention=job.settings.attention)
    place(student, world)
    teacher, states = _teacher_of(student, job, world, dtype=dtype)
    objective = Objective(student, divergence=divergence_of(loss), states=states)
    if isinstance(job.settings, Correct):
        choose_trained(student, job.settings, seed=job.seed)
    objective.to(world.device)
    vocab_size = student.config.vocab_size
    validation = None
    if job.validation_tokens is not None:
        store = TokenStore.open(job.validation_tokens)
        validation = Windows(store, job.validation_seq_len, vocab_size)
    windows = Windows(TokenStore.open(job.train_tokens), job.seq_len, vocab_size, job.apart)
    if states is not None and teacher is not None:
        with torch.no_grad():
            batch = windows.batch([0]).to(world.device)
            own = predict(student, batch, states.student_places)
            states.start(own.states, teacher.predict(batch).states)
    if job.settings.activation_checkpointing:
        checkpoint_layers(student)
    if job.settings.compile:
        compile_layers(student)
    shard(objective, student, world, dtype=dtype)
    correction = None
    if isinstance(teacher, CorrectedTeacher) and job.correct is not None:
        correction = Correction.of(
            teacher, job.correct, Schedule.of(job.settings, seq_len=job.seq_len), world
        )
    trainer = Trainer(
        objective=objective,
        teacher=teacher,
        correction=correction,
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
    first = trainer.windows.batch(trainer.window_ids()[: trainer.leg.micro_batch])
    with trainer.autocast():
        check_before_training(
            objective,
            teacher,
            first.to(world.device),
            untrained=job.untrained,
            tokens=rows_with_tokens(job.student),
        )
    return trainer


def _teacher_of(
    student: PreTrainedModel, job: Job, world: World, *, dtype: torch.dtype
) -> tuple[Teaches | None, StatesLoss | None]:
    """Who teaches, where it is asked, and the states that the student imitates besides."""
    if job.teacher is None:
        return None, None
    if is_capture(job.teacher):
        return CapturedTeacher(Cache.open(job.teacher, hashes=False), world.device), None
    learns = job.correct is not None
    model = load_model(
        job.teacher, dtype=torch.float32 if learns else dtype, attention=job.settings.attention
    )
    states = StatesLoss.between(student, model, _loss(job.settings).states)
    places = states.teacher_places if states else ()
    if job.correct is None:
        if job.settings.compile:
            compile_layers(model)
        placement = job.settings.teacher if isinstance(job.settings, Distill) else "replicated"
        teacher = Teacher(model, places)
        place_teacher(model, world, how=placement)
        return teacher, states
    place(model, world)
    corrected = CorrectedTeacher(model, places)
    choose_trained(model, job.correct, seed=job.seed)
    return corrected.to(world.device), states


def _publish(job: Job, trainer: Trainer, history: History) -> None:
    """Gather the weights and publish the repository once, by the leading process."""
    world = trainer.world
    student = Trained.gather(trainer.objective.student, job.student, job.settings, world)
    teacher = None
    if trainer.correction is not None and job.teacher is not None:
        corrected, correct = trainer.correction.teacher.model, trainer.correction.settings
        teacher = Trained.gather(corrected, job.teacher, correct, world)
    if world.leads:
        objective = "cross_entropy" if job.teacher is None else _loss(job.settings).logits
        batch = trainer.train_windows.batch([0])
        with staged(job.out, provenance=job.provenance, overwrite=job.overwrite) as folder:
            student.write(folder, batch=batch)
            dump(folder / METRICS, {"schema": 1, "objective": objective} | history.as_json())
            if teacher is not None:  # an artifact of its own inside: nobody has one without other
                beside = replace(job.provenance, kind="correct")
                with staged(folder / CORRECTED, provenance=beside) as place_of_teacher:
                    teacher.write(place_of_teacher, batch=batch)
    world.from_leader(None)  # published


def _loss(settings: Training) -> Loss:
    """The loss against a teacher; the default where none is asked."""
    if isinstance(settings, Distill) and not labels_alone(settings):
        return settings.loss
    return Loss()


def _silent(kind: str, fields: object) -> None:
    """The events of the processes that do not lead."""
