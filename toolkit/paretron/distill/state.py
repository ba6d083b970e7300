"""Resumable state: numbered checkpoints, each published whole, the newest intact one wins.

Tensors are written by torch.distributed.checkpoint, every process its own parts, as safetensors:
nothing here is a pickle. The manifest is verified before a tensor is read.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from paretron.artifacts.jsonfile import dump, read_object
from paretron.artifacts.manifest import MANIFEST, Provenance, verify
from paretron.artifacts.staging import staged
from paretron.distill.history import History
from paretron.distill.job import OnEvent
from paretron.errors import Code, ParetronError, Problem, raise_all
from paretron.workers.world import World

KIND = "training-state"
KEEP = 2
_HISTORY = "history.json"
_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class StateFolder:
    """The checkpoints of one training; `settings` is all that its result depends on.

    With `start_over`, checkpoints of other settings are removed instead of refused.
    """

    folder: Path
    settings: Mapping[str, Any]
    world: World
    on_event: OnEvent
    start_over: bool = False

    def save(self, step: int, tensors: Mapping[str, Tensor], history: History) -> None:
        """Publish the state after `step` steps, then drop all but the newest two.

        Errors: DISK when the volume is full; earlier checkpoints stay as they were.
        """
        with self._staged(f"step-{step:06d}") as folder:
            _write(folder, tensors, self.world)
            if self.world.leads:
                dump(folder / _HISTORY, history.as_json())
        if self.world.leads:
            for old in self._published()[KEEP:]:
                _remove(old)
            self._tidy()

    def resume(self, tensors: Mapping[str, Tensor]) -> tuple[int, History]:
        """Read the newest intact checkpoint into `tensors`; step 0 when there is none at all.

        Errors: RUN_MISMATCH naming every setting that differs, INPUT_MANIFEST when there are
        checkpoints but none is intact. A damaged one is named in a note and passed over.
        """
        newest: Path | None = self.world.from_leader(
            self._newest_intact() if self.world.leads else None
        )
        if newest is None:
            return 0, History()
        _read(newest, tensors, alone=self.world.mesh is None)
        history = History.from_json(read_object(newest / _HISTORY, code=Code.INPUT_MANIFEST))
        return _step(newest), history

    def _newest_intact(self) -> Path | None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._tidy()
        damage: list[Problem] = []
        for path in self._published():
            try:
                self._check(path)
                return path
            except ParetronError as error:
                if error.problems[0].code is Code.RUN_MISMATCH:
                    self._start_over(error)
                    return None
                damage += error.problems
                message = f"checkpoint passed over: {error.problems[0]}"
                self.on_event("note", {"message": message})
        if damage:
            fix = f"remove {self.folder} to train from the start"
            raise_all([Problem(p.code, p.cause, where=p.where, fix=fix) for p in damage])
        return None

    def _start_over(self, mismatch: ParetronError) -> None:
        if not self.start_over:
            raise mismatch
        self.on_event("note", {"message": f"checkpoints removed: {mismatch.problems[0].cause}"})
        for path in self._published():
            _remove(path)

    def _tidy(self) -> None:
        """Remove what is hidden: lock files, and folders that a killed process left."""
        for leftover in self.folder.glob(".step-*"):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink()

    def _check(self, path: Path) -> None:
        manifest = verify(path)
        if manifest["kind"] != KIND:
            raise ParetronError(
                Problem(Code.INPUT_MANIFEST, f"holds {manifest['kind']!r}, not {KIND}", str(path))
            )
        there, here = _flat(manifest["settings"]), _flat(self.settings)
        raise_all(
            [
                Problem(
                    Code.RUN_MISMATCH,
                    f"{key} was {there.get(key)!r} when this training began, now it is "
                    f"{here.get(key)!r}",
                    where=str(path),
                    fix=f"restore it, or remove {self.folder} to train from the start",
                )
                for key in sorted(there.keys() | here.keys())
                if there.get(key) != here.get(key)
            ]
        )

    def _published(self) -> list[Path]:
        """Checkpoint folders, newest first."""
        found = [p for p in self.folder.glob("step-*") if _NAME.fullmatch(p.name)]
        return sorted(found, key=_step, reverse=True)

    @contextmanager
    def _staged(self, name: str) -> Iterator[Path]:
        """A folder that all processes write into and the leading one publishes.

        It may replace one of the same step that was passed over as damaged.
        """
        if not self.world.leads:
            yield self.world.from_leader(None)
            self.world.from_leader(None)  # published
            return
        provenance = Provenance(kind=KIND, settings=self.settings)
        target = self.folder / name
        if target.exists() and not (target / MANIFEST).is_file():
            _remove(target)  # damaged so far that staging would not take it for ours
        with staged(target, provenance=provenance, overwrite=True) as folder:
            yield self.world.from_leader(folder)
            # dcp.save returns when every process has written its part
        self.world.from_leader(None)


def training_tensors(
    objective: nn.Module, optimizer: torch.optim.Optimizer, *, step: int
) -> dict[str, Tensor]:
    """Trained weights and both moments of AdamW by name; what `save` writes and `resume` fills.

    Moments that do not exist yet are made, as they would be after `step` steps of no gradient.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in objective.named_parameters():
        if not parameter.requires_grad:
            continue
        moments = optimizer.state[parameter]
        if not moments:
            moments["exp_avg"] = torch.zeros_like(parameter)
            moments["exp_avg_sq"] = torch.zeros_like(parameter)
        moments["step"] = torch.tensor(float(step), device=parameter.device)
        tensors[f"weight/{name}"] = parameter.detach()
        tensors[f"exp_avg/{name}"] = moments["exp_avg"]
        tensors[f"exp_avg_sq/{name}"] = moments["exp_avg_sq"]
    return tensors


def _read(folder: Path, tensors: Mapping[str, Tensor], *, alone: bool) -> None:
    reader = HuggingFaceStorageReader(str(folder))
    try:
        with _quiet():
            load(dict(tensors), storage_reader=reader, no_dist=alone)
    except CheckpointException as error:
        reason = _first_failure(error)
        raise ParetronError(
            Problem(
                Code.INPUT_MANIFEST,
                f"its tensors are not those of this training: {str(reason)[:200]}",
                where=str(folder),
                fix=f"remove {folder.parent} to train from the start",
            )
        ) from reason


def _write(folder: Path, tensors: Mapping[str, Tensor], world: World) -> None:
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    alone = world.mesh is None
    try:
        with _quiet():
            save(dict(tensors), storage_writer=writer, process_group=world.group, no_dist=alone)
    except CheckpointException as error:
        raise _first_failure(error) from error


def _first_failure(error: CheckpointException) -> BaseException:
    """It names what failed on each process; the first of these is what the user must know."""
    return next(iter(error.failures.values()))[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's warning that one process is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _remove(path: Path) -> None:
    """Out of sight by one rename, then gone: no half checkpoint is ever seen."""
    hidden = path.with_name(f".{path.name}.old")
    os.rename(path, hidden)
    shutil.rmtree(hidden)
