"""Executing a plan: every stage in order, reused when it is done, resumed when it was cut."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from paretron.artifacts.hub import locate
from paretron.artifacts.jsonfile import dump
from paretron.artifacts.manifest import Provenance
from paretron.artifacts.reader import Checkpoint
from paretron.artifacts.staging import locked, refuse_overlap
from paretron.errors import ParetronError, raise_all
from paretron.plan.plan import Plan
from paretron.plan.stages import REPORT, TEACHER, Stage
from paretron.recipe import Recipe
from paretron.run.events import EventLog, OnEvent, Watcher
from paretron.run.signals import interruptible
from paretron.run.texts import content_identity
from paretron.run.workspace import Workspace, fingerprint, is_done, refuse_other_recipe


@dataclass(frozen=True)
class Context:
    """What a stage gets: the recipe, its inputs' folders, where to write, whom to tell."""

    plan: Plan
    stage: Stage
    folders: Mapping[str, Path]  # role -> folder
    out: Path
    state: Path
    provenance: Provenance
    overwrite: bool
    offline: bool
    on_event: OnEvent
    places: Mapping[str, Path]  # every earlier stage -> its artifact

    @property
    def recipe(self) -> Recipe:
        """The run's recipe."""
        return self.plan.recipe

    def checkpoint(self, name: str) -> Path:
        """The finished Hugging Face checkpoint of the teacher or of a student."""
        if name != TEACHER:
            return self.places[f"{name}.distill"]
        last = [stage for stage in (TEACHER, "correct", "decide") if stage in self.places][-1]
        return self.places[last]


StageFunction = Callable[[Context], None]


def run_plan(
    plan: Plan,
    out: Path,
    *,
    stages: Mapping[str, StageFunction],
    offline: bool = False,
    overwrite: bool = False,
    stamp: str | None = None,
    watcher: Watcher | None = None,
) -> Path:
    """Execute a plan in the folder `out` and return the report's folder.

    `stages` maps a stage's kind to what does it. A plan with problems raises them all before any
    work. INTERRUPTED on SIGTERM or Ctrl-C; running again continues.
    """
    raise_all(plan.problems)
    if plan.teacher_folder is not None and stamp is None:
        refuse_overlap(out, plan.teacher_folder)
    workspace = Workspace(out.absolute())
    workspace.root.mkdir(parents=True, exist_ok=True)
    events = EventLog(workspace.root / "events.jsonl", watcher=watcher)
    with locked(workspace.root / ".lock", what=str(out)), events, interruptible():
        if not overwrite:
            refuse_other_recipe(workspace, plan.stages)
        dump(workspace.root / "plan.json", plan.as_json())
        dump(workspace.root / "recipe.json", plan.recipe.model_dump(mode="json", by_alias=True))
        for notice in plan.notices:
            events.emit(TEACHER, "notice", {"message": notice})
        places: dict[str, Path] = {}
        for stage in plan.stages:
            if stage.name == TEACHER and plan.recipe.teacher.model is not None:
                places[stage.name] = _given_teacher(plan, events, offline=offline)
                continue
            _run_stage(plan, stage, places, workspace, events, stages, overwrite, offline, stamp)
            places[stage.name] = workspace.artifact(stage.name)
    return workspace.artifact(REPORT)


def _run_stage(
    plan: Plan,
    stage: Stage,
    places: Mapping[str, Path],
    workspace: Workspace,
    events: EventLog,
    stages: Mapping[str, StageFunction],
    overwrite: bool,
    offline: bool,
    stamp: str | None,
) -> None:
    folders = {role: places[name] for role, name in stage.inputs.items()}
    found = {role: workspace.identity_of(folder) for role, folder in folders.items()}
    identities = {role: known.sha256 for role, known in found.items()}
    wanted = fingerprint(stage, identities, content_identity(stage, plan.recipe, workspace))
    out, state = workspace.artifact(stage.name), workspace.state(stage.name)
    replace = overwrite or stage.name == REPORT  # a report costs nothing
    if is_done(out, wanted, overwrite=replace):
        shutil.rmtree(state, ignore_errors=True)  # its process may have died right after
        events.emit(stage.name, "reused", {})
        return
    events.emit(stage.name, "started", {})
    context = Context(
        plan=plan,
        stage=stage,
        folders=folders,
        out=out,
        state=state,
        provenance=Provenance(
            kind=stage.kind,
            parents=identities,
            settings=stage.settings,
            seed=plan.recipe.seed,
            stamp=stamp,
            stage=wanted,
            unverified=tuple(role for role, known in found.items() if not known.verified),
        ),
        overwrite=replace,
        offline=offline,
        on_event=events.of(stage.name),
        places=places,
    )
    try:
        stages[stage.kind](context)
    except ParetronError as error:
        fields = {"problems": [p.as_json() for p in error.problems]}
        events.emit(stage.name, "failed", fields)
        raise
    shutil.rmtree(state, ignore_errors=True)
    events.emit(stage.name, "finished", {})


def _given_teacher(plan: Plan, events: EventLog, *, offline: bool) -> Path:
    """The teacher's folder, downloaded if need be at the commit that was planned with.

    Events: "notice" for what is left out of it, "given" with the folder and its commit.
    """
    teacher = plan.recipe.teacher
    revision = plan.teacher_commit or teacher.revision
    located = locate(str(teacher.model), revision=revision, offline=offline, weights=True)
    for notice in Checkpoint.open(located.folder).notices:
        if notice not in plan.notices:  # its headers may have been planned with
            events.emit(TEACHER, "notice", {"message": notice})
    fields = {"folder": str(located.folder), "commit": located.commit}
    events.emit(TEACHER, "given", fields)
    return located.folder
