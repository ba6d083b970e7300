"""The profile stage: models and their exports handed to the profiler, its result published."""

from __future__ import annotations

from pathlib import Path

from paretron.artifacts.config import read_config
from paretron.artifacts.jsonfile import dump
from paretron.artifacts.manifest import Provenance
from paretron.artifacts.reader import INDEX, SINGLE
from paretron.artifacts.staging import staged
from paretron.errors import Code, ParetronError, Problem
from paretron.plugins import ENGINES, find_plugin
from paretron.recipe import Profile, Student
from paretron.run.events import OnEvent
from paretron.run.runner import Context
from paretron_profiling.measure import profile_models
from paretron_profiling.models import TEACHER, ModelFacts, ModelUnderTest
from paretron_profiling.result import ProfileStopped

PROFILE = "profile.json"


def kind_of(student: Student) -> str:
    """What a report calls a student: by what was cut."""
    if student.search is not None:
        return "searched"
    axes = student.axes()
    if set(axes) == {"layers"}:
        return "depth"
    return "width" if "layers" not in axes else "width+depth"


def profile_run(context: Context) -> None:
    """Profile every model of the run on the exports that the engines want."""
    recipe = context.recipe
    if recipe.profile is None:
        raise ValueError("a profile stage without a profile section")
    folders: dict[str, dict[str, Path]] = {name: {} for name in (TEACHER, *recipe.students)}
    for role, folder in context.folders.items():
        name, _, form = role.partition(".")
        folders[name][form] = folder
    checkpoints = {name: context.checkpoint(name) for name in folders}
    models = [
        ModelUnderTest(
            name,
            TEACHER if name == TEACHER else kind_of(recipe.students[name]),
            by_form,
            ModelFacts.of(checkpoints[name]),
        )
        for name, by_form in folders.items()
    ]
    publish_profile(
        models,
        profile=recipe.profile,
        seed=recipe.seed,
        out=context.out,
        provenance=context.provenance,
        overwrite=context.overwrite,
        on_event=context.on_event,
    )


def publish_profile(
    models: list[ModelUnderTest],
    *,
    profile: Profile,
    seed: int,
    out: Path,
    provenance: Provenance,
    overwrite: bool,
    on_event: OnEvent,
) -> None:
    """Measure and write profile.json, raw samples included.

    When an engine fails, what was measured until then is kept beside `out`, marked incomplete.
    """
    partial = out.with_name(f"{out.name}-incomplete.json")
    try:
        result = profile_models(models, profile=profile, seed=seed, on_event=on_event)
    except ProfileStopped as stopped:
        partial.parent.mkdir(parents=True, exist_ok=True)
        dump(partial, stopped.partial.to_json())
        on_event("note", {"message": f"measured until then: {partial}"})
        raise
    with staged(out, provenance=provenance, overwrite=overwrite) as folder:
        dump(folder / PROFILE, result.to_json())
    partial.unlink(missing_ok=True)


def models_by_name(named: list[str], *, engine: str) -> list[ModelUnderTest]:
    """The models of `NAME=DIR` arguments, each in the form that the engine runs.

    USAGE for an argument of another form. Weights count as they lie on disk.
    """
    form = find_plugin(ENGINES, engine, where="--engine").wants
    models = []
    for text in named:
        name, equals, folder = text.partition("=")
        if not equals or not name or not Path(folder).is_dir():
            raise ParetronError(
                Problem(
                    Code.USAGE,
                    f"{text!r} is not NAME=DIR with a folder that is there",
                    fix="teacher=runs/a/stages/correct width=runs/a/stages/width.distill",
                )
            )
        kind = TEACHER if name == TEACHER else "student"
        models.append(ModelUnderTest(name, kind, {form: Path(folder)}, facts_of(Path(folder))))
    return models


def facts_of(folder: Path) -> ModelFacts:
    """The facts of a checkpoint, or of an export that keeps its source's config.json."""
    if (folder / SINGLE).is_file() or (folder / INDEX).is_file():
        return ModelFacts.of(folder)
    weights = sum(p.stat().st_size for p in folder.glob("*.onnx*"))
    return ModelFacts.of_config(read_config(folder), weight_bytes=weights, kv_value_bytes=4)
