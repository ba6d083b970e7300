"""A run's folder: one artifact a stage, known again by its fingerprint.

RUN/recipe.json plan.json events.jsonl inputs.json
RUN/stages/NAME/       a stage's artifact, absent or complete
RUN/state/NAME/        what an interrupted stage resumes from
RUN/report/            report.html, report.json
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paretron import __version__
from paretron.artifacts.manifest import MANIFEST, Identity, identity, read_manifest
from paretron.errors import Code, ParetronError, Problem, raise_all
from paretron.plan.stages import REPORT, Stage
from paretron.run.memory import remembered, remembered_identity


@dataclass(frozen=True)
class Workspace:
    """The folder of one run."""

    root: Path

    def artifact(self, stage: str) -> Path:
        """Where a stage's artifact stands when it is done; the report lies where people look."""
        return self.root / stage if stage == REPORT else self.root / "stages" / stage

    def state(self, stage: str) -> Path:
        """Where a stage keeps what it resumes from."""
        return self.root / "state" / stage

    def identity_of(self, folder: Path) -> Identity:
        """The identity of an artifact of this run, or of a folder from outside.

        What comes from outside is read whole and compared with the sums that are known of it, once:
        it is known again by sizes and times.
        """
        if folder.is_relative_to(self.root):
            return Identity(identity(folder), verified=True)
        return remembered_identity(self._memory, folder)

    def remembered(self, name: str, files: Sequence[Path], compute: Callable[[], str]) -> str:
        """A hash over files, computed again only when a file's size or time has changed."""
        return remembered(self._memory, name, files, compute)

    @property
    def _memory(self) -> Path:
        return self.root / "inputs.json"


def fingerprint(stage: Stage, inputs: Mapping[str, str], content: str | None) -> dict[str, Any]:
    """What a stage's result depends on: its settings, its inputs' identities, the code's version.

    `content` is the identity of texts that the settings only name.
    """
    return {
        "settings": dict(stage.settings),
        "inputs": dict(inputs),
        "content": content,
        "code": __version__,
    }


def refuse_other_recipe(workspace: Workspace, stages: Sequence[Stage]) -> None:
    """RUN_MISMATCH for every stage that another recipe made, before any work is done.

    What a stage's inputs hold is compared when it comes up; settings and their names are known.
    """
    problems = []
    for stage in stages:
        folder = workspace.artifact(stage.name)
        if stage.name == REPORT or not (folder / MANIFEST).is_file():
            continue
        made = read_manifest(folder)["stage"]
        before = {"settings": made.get("settings"), "inputs": sorted(made.get("inputs", {}))}
        now = {"settings": dict(stage.settings), "inputs": sorted(stage.inputs)}
        if differing := differences(before, now):
            problems.append(_mismatch(folder, differing))
    raise_all(problems)


def _mismatch(folder: Path, differing: list[str]) -> Problem:
    return Problem(
        Code.RUN_MISMATCH,
        "made by another recipe, input or version: " + "; ".join(differing[:8]),
        where=str(folder),
        fix="name another --out, or add --overwrite to make again what differs",
    )


def is_done(folder: Path, wanted: Mapping[str, Any], *, overwrite: bool) -> bool:
    """Whether a stage's artifact is there and matches; RUN_MISMATCH naming what differs.

    With `overwrite` a stage that differs is to be made again instead.
    """
    if not (folder / MANIFEST).is_file():
        return False
    manifest = read_manifest(folder)
    for name, entry in manifest["files"].items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != entry["bytes"]:
            raise ParetronError(
                Problem(
                    Code.INPUT_MANIFEST,
                    "absent, or not of the size that was written",
                    where=str(file),
                    fix="remove the stage's folder and run again",
                )
            )
    differing = differences(manifest["stage"], wanted)
    if not differing:
        return True
    if overwrite:
        return False
    raise ParetronError(_mismatch(folder, differing))


def differences(before: Any, now: Any, *, at: str = "") -> list[str]:
    """The fields in which two fingerprints differ, as `path: before -> now`."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        found = []
        for key in sorted({*before, *now}):
            path = f"{at}.{key}" if at else str(key)
            found += differences(before.get(key), now.get(key), at=path)
        return found
    if _plain(before) == _plain(now):
        return []
    return [f"{at}: {str(before)[:40]} -> {str(now)[:40]}"]


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))
