"""The stage: a teacher and a text in, a folder that stands in for the teacher out.

The windows are written file by file. A complete file is never made again, so what a killed process
leaves is continued, to the same bytes; processes share out the files that are still to be made.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from paretron.artifacts.config import family_and_config
from paretron.artifacts.copying import link_or_copy
from paretron.artifacts.manifest import Provenance, identity
from paretron.artifacts.models import load_model
from paretron.artifacts.staging import locked, refuse_existing, refuse_overlap, staged
from paretron.data.store import TokenStore
from paretron.data.tokenizer import tokenizer_sha256
from paretron.distill.batches import Windows
from paretron.distill.capture.cache import (
    DTYPES,
    HEADER,
    Header,
    file_name,
    mismatches,
    write_head,
)
from paretron.distill.capture.codec import TopTokensCodec
from paretron.distill.fused import DeferredLogits, product_dtype
from paretron.distill.job import OnEvent, store_identity
from paretron.distill.memory import memory_explained
from paretron.distill.meter import peak_memory_bytes
from paretron.distill.objective import Teacher
from paretron.distill.preflight import check_teacher
from paretron.distill.top import TopTokens
from paretron.errors import Code, ParetronError, Problem, raise_all
from paretron.families import logit_rule, parameter_counts
from paretron.recipe import Distill
from paretron.workers.launch import launch, under_torchrun
from paretron.workers.world import World, joined_world

WORKER = "paretron.distill.capture.worker"
FILE_BYTES = 32 << 20  # a few minutes' work at most, and no more files than a folder likes
# Logits alive at once, in fp32.
_CHUNK_ELEMENTS = {"cpu": 8 << 20, "cuda": 128 << 20}
_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class CaptureJob:
    """The arguments of `capture`, which explains them."""

    teacher: Path
    tokens: Path
    kind: Literal["top_k", "hidden"]
    settings: Distill
    seq_len: int
    apart: bool
    out: Path
    state: Path
    provenance: Provenance
    overwrite: bool
    file_bytes: int

    def to_json(self) -> str:
        """All fields as JSON text; paths are made absolute."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain = {k: str(v.absolute()) if isinstance(v, Path) else v for k, v in fields.items()}
        settings = self.settings.model_dump(mode="json")
        provenance = dataclasses.asdict(self.provenance)
        return json.dumps(plain | {"settings": settings, "provenance": provenance})

    @classmethod
    def from_json(cls, text: str) -> CaptureJob:
        """The inverse of `to_json`."""
        fields: dict[str, Any] = json.loads(text)
        paths = {name: Path(fields[name]) for name in ("teacher", "tokens", "out", "state")}
        provenance = fields["provenance"]
        provenance["unverified"] = tuple(provenance["unverified"])
        settings = Distill.model_validate(fields["settings"])
        return cls(
            **fields | paths | {"settings": settings, "provenance": Provenance(**provenance)}
        )


def capture(
    teacher: Path,
    tokens: Path,
    *,
    kind: Literal["top_k", "hidden"],
    settings: Distill,
    seq_len: int,
    apart: bool,
    out: Path,
    state: Path,
    provenance: Provenance,
    overwrite: bool = False,
    file_bytes: int = FILE_BYTES,
    on_event: OnEvent,
) -> None:
    """Ask a teacher about every window of a token store; again to continue.

    Of each position the `settings.loss.top_k` likeliest tokens at the loss's temperature are kept,
    or the hidden state in `settings.dtype`. In `state` lies what a run that was killed need not do
    again, in files of about `file_bytes`. With `settings.processes` above 1, torchrun is started,
    unless this process is one of a torchrun's already; each holds the whole teacher.
    Events: "progress", "note". Errors: OUT_EXISTS, OUT_OVERLAP, LOCKED, RUN_MISMATCH,
    GATE_PREFLIGHT, GATE_NONFINITE, DISK, MEMORY, DEVICE (a process died).
    """
    job = CaptureJob(
        teacher=teacher,
        tokens=tokens,
        kind=kind,
        settings=settings,
        seq_len=seq_len,
        apart=apart,
        out=out,
        state=state,
        provenance=provenance,
        overwrite=overwrite,
        file_bytes=file_bytes,
    )
    if settings.processes == 1 or under_torchrun():
        run_job(job, on_event=on_event)
        return
    launch(
        WORKER,
        job.to_json(),
        processes=settings.processes,
        died=Problem(
            Code.DEVICE,
            "a process of the capture died",
            where=str(state),
            fix="the same command again continues; fewer processes or a smaller micro_batch if "
            "memory ran out",
        ),
        hands_on_stop=False,
        on_event=on_event,
    )


def run_job(job: CaptureJob, *, on_event: OnEvent) -> None:
    """Take part in a job as the only process, or as one of torchrun's."""
    with joined_world() as world:
        if not world.leads:
            with _memory_explained(job, world):
                _write_files(job, world, _silent)
            return
        refuse_existing(job.out, overwrite=job.overwrite)
        for source in (job.teacher, job.tokens):
            refuse_overlap(job.out, source)
        with locked(job.state / ".lock", what=str(job.state)):
            with _memory_explained(job, world):
                digests = _write_files(job, world, on_event)
            publishing = staged(
                job.out, provenance=job.provenance, overwrite=job.overwrite, digests=digests
            )
            with publishing as folder:
                for path in sorted(job.state.iterdir()):
                    if not path.name.startswith((".", "sum-")):
                        # What is published stays here, should the rename not come.
                        link_or_copy(path, folder / path.name)


def _memory_explained(job: CaptureJob, world: World) -> AbstractContextManager[None]:
    width = DTYPES[job.settings.dtype].itemsize
    return memory_explained(
        job.settings,
        state_bytes=width * parameter_counts(*family_and_config(job.teacher)).total,
        peak_bytes=lambda: peak_memory_bytes(world.device),
        asks_alone=True,
    )


def _write_files(job: CaptureJob, world: World, on_event: OnEvent) -> dict[str, str]:
    """Every file of windows in the state folder; their sha256, in the leading process."""
    dtype = DTYPES[job.settings.dtype]
    model = load_model(job.teacher, dtype=dtype).to(world.device)
    store = TokenStore.open(job.tokens)
    windows = Windows(store, job.seq_len, model.config.vocab_size, job.apart)
    teacher = Teacher(model)
    header: Header = world.from_leader(_header(job, windows) if world.leads else None)
    missing: list[int] = world.from_leader(_begin(job, header) if world.leads else None)
    asked = torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
    with torch.no_grad(), asked:
        first = windows.batch(range(min(job.settings.micro_batch, len(windows))))
        untrained = job.provenance.stamp is not None
        check_teacher(teacher, first.to(world.device), vocab_size=header.vocab_size,
                      untrained=untrained)  # fmt: skip
        if header.hidden is not None and world.leads:
            head = model.get_output_embeddings()
            write_head(job.state, head.weight, head.bias)
        mine = missing[world.rank :: world.size]
        for done, number in enumerate(mine):
            with _full_disk_told(job.state):
                _write_file(job, header, number, windows, teacher, world.device)
            share = (done + 1) / len(mine) * len(missing)
            total = len(header.files)
            finished = total - len(missing) + share
            tokens = int(finished / total * header.num_windows) * header.seq_len
            everything = header.num_windows * header.seq_len
            on_event("progress", {"done": tokens, "total": everything, "unit": "tokens"})
    world.total(0.0)  # every process has written its files
    numbers = range(len(header.files))
    return {file_name(n): _sum(job.state, n) for n in numbers} if world.leads else {}


def _header(job: CaptureJob, windows: Windows) -> Header:
    family, config = family_and_config(job.teacher)
    rule = logit_rule(family, config)
    vocab_size = windows.vocab_size
    loss, hidden = job.settings.loss, job.kind == "hidden"
    if not hidden and (loss.top_k is None or loss.top_k >= vocab_size):
        raise ParetronError(
            Problem(
                Code.RECIPE_VALUE,
                f"top_k is {loss.top_k}, of a vocabulary of {vocab_size} tokens",
                where="distill.loss.top_k",
                fix=f"state it, at most {vocab_size - 1}; 64 is usual",
            )
        )
    size = int(config["hidden_size"])
    if hidden:
        record = size * DTYPES[job.settings.dtype].itemsize
    else:
        record = TopTokensCodec(vocab_size, loss.top_k or 1).record_bytes
    return Header(
        teacher=job.provenance.parents.get("teacher") or identity(job.teacher),
        tokens=store_identity(job.tokens),
        tokenizer=tokenizer_sha256(job.teacher),
        vocab_size=vocab_size,
        seq_len=job.seq_len,
        documents="apart" if job.apart else "joined",
        num_windows=len(windows),
        windows_per_file=max(1, job.file_bytes // (job.seq_len * record)),
        top_k=None if hidden else loss.top_k,
        temperature=1.0 if hidden else loss.temperature,
        hidden=size if hidden else None,
        dtype=job.settings.dtype,
        divisor=rule.divisor if hidden else 1.0,
        softcap=rule.softcap if hidden else None,
    )


def _begin(job: CaptureJob, header: Header) -> list[int]:
    """The files still to be made; RUN_MISMATCH by field where the state is another capture's."""
    if (job.state / HEADER).is_file():
        there = Header.load(job.state)
        differing = mismatches(there.model_dump(), header.model_dump(), where=job.state / HEADER)
        if differing and not job.overwrite:
            fix = f"restore it, or remove {job.state} to capture from the start"
            raise_all([replace(p, fix=fix) for p in differing])
        if differing:
            for path in job.state.iterdir():
                if path.name != ".lock":
                    path.unlink()
    header.dump(job.state)
    return [n for n in range(len(header.files)) if not _complete(job.state, header, n)]


def _complete(state: Path, header: Header, number: int) -> bool:
    path = state / file_name(number)
    return path.is_file() and path.stat().st_size == header.file_bytes(number)


def _write_file(
    job: CaptureJob,
    header: Header,
    number: int,
    windows: Windows,
    teacher: Teacher,
    device: torch.device,
) -> None:
    """One file with its sum beside it; its name appears when all of it is on the disk."""
    digest, path = hashlib.sha256(), job.state / file_name(number)
    half = path.with_name(f".{path.name}")
    with half.open("wb") as f:
        ids, step = header.files[number], job.settings.micro_batch
        for start in range(0, len(ids), step):
            batch = windows.batch(ids[start : start + step]).to(device)
            data = _records(teacher.predict(batch).logits, header).numpy().data
            digest.update(data)
            f.write(data)
        f.flush()
        os.fsync(f.fileno())
    (job.state / f"sum-{number:05d}").write_text(digest.hexdigest())
    half.rename(path)


def _records(logits: DeferredLogits, header: Header) -> Tensor:
    """Bytes of a batch, position by position; GATE_NONFINITE where one holds no numbers."""
    flat = logits.flat()
    if header.hidden is not None:
        hidden = flat.hidden.to(DTYPES[header.dtype]).contiguous()
        _refuse_nonfinite(hidden)
        return hidden.view(torch.uint8).flatten().cpu()
    codec, device = header.codec, flat.hidden.device
    head = flat.head(header.vocab_size, product_dtype(flat))
    chunk = max(1, _CHUNK_ELEMENTS.get(device.type, _CHUNK_ELEMENTS["cuda"]) // header.vocab_size)
    buffer = torch.empty(chunk, header.vocab_size, dtype=head.wide, device=device)
    cap, parts = replace(flat.rule, divisor=1.0), []  # the head has divided already
    with torch.autocast(device.type, enabled=False):
        for start in range(0, len(flat.hidden), chunk):
            block = cap(head.logits(slice(start, start + chunk), buffer))
            top = TopTokens.of(block, k=codec.k, temperature=codec.temperature)
            _refuse_nonfinite(top.log_probabilities)
            parts.append(codec.encode(top).cpu())
    return torch.cat(parts).flatten()


def _refuse_nonfinite(values: Tensor) -> None:
    if bool(values.isfinite().all()):
        return
    raise ParetronError(
        Problem(
            Code.GATE_NONFINITE,
            "the teacher gives values that are no numbers",
            where="teacher",
            fix="check the teacher's weights; float32 if its activations overflow",
        )
    )


def _sum(state: Path, number: int) -> str:
    return (state / f"sum-{number:05d}").read_text()


@contextmanager
def _full_disk_told(state: Path) -> Iterator[None]:
    """DISK instead of the system's error when the volume is full; complete files stay."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_IS_FULL:
            raise
        raise ParetronError(
            Problem(
                Code.DISK,
                f"{error.strerror}, {shutil.disk_usage(state).free} bytes free",
                where=str(state),
                fix="free some space; the same command again continues",
            )
        ) from error


def _silent(kind: str, fields: Mapping[str, object]) -> None:
    """The events of the processes that do not lead."""
