"""The profile stage: models and their exports handed to the profiler, its result published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paretron.artifacts.config import read_config
from paretron.artifacts.jsonfile import dump, read_object
from paretron.artifacts.manifest import Provenance
from paretron.artifacts.reader import INDEX, SINGLE
from paretron.artifacts.staging import refuse_existing, staged
from paretron.errors import Code, ParetronError, Problem, raise_all
from paretron.plugins import ENGINES, find_plugin
from paretron.recipe import Engine, Profile, Student
from paretron.run.events import OnEvent
from paretron.run.runner import Context
from paretron_profiling.measure import profile_models, with_bounds
from paretron_profiling.models import TEACHER, ModelFacts, ModelUnderTest
from paretron_profiling.result import ProfileResult, ProfileStopped, flagged

PROFILE = "profile.json"
_SERVED = "openai"  # the engine that asks servers which run already


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
            {"hf": checkpoints[name], **by_form},  # an export need not keep a config
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
    """Measure and write profile.json, raw samples, the machine's own limits and bounds included.

    When an engine fails, or somebody stops it, what was measured until then is kept beside `out`,
    marked incomplete. OUT_EXISTS before anything is measured.
    """
    refuse_existing(out, overwrite=overwrite)
    partial = out.with_name(f"{out.name}-incomplete.json")
    try:
        result = profile_models(models, profile=profile, seed=seed, on_event=on_event)
    except ProfileStopped as stopped:
        if any(stopped.partial.measurements.values()):
            partial.parent.mkdir(parents=True, exist_ok=True)
            dump(partial, stopped.partial.to_json())
            on_event("note", {"message": f"measured until then: {partial}"})
        raise
    partial.parent.mkdir(parents=True, exist_ok=True)
    dump(partial, result.to_json())  # whatever becomes of the bounds
    result = with_bounds(result, models, on_event=on_event)
    with staged(out, provenance=provenance, overwrite=overwrite) as folder:
        dump(folder / PROFILE, result.to_json())
    partial.unlink(missing_ok=True)


def require_unflagged(folder: Path) -> None:
    """GATE_FLAGGED with every measurement of a profile that something makes doubtful."""
    found = read_object(folder / PROFILE, code=Code.INPUT_CONFIG)
    raise_all(flagged(ProfileResult.from_json(found), where=str(folder / PROFILE)))


def engines_by_name(named: Sequence[str], *, servers: Sequence[str]) -> list[dict[str, Any]]:
    """`profile.engines` of `NAME` or `NAME=PYTHON` arguments, with the `MODEL=URL` of servers.

    USAGE for an engine or a model that is named twice, or a server without an engine to ask it.
    """
    found: dict[str, dict[str, Any]] = {}
    for text in named:
        name, equals, python = text.partition("=")
        if name in found or (equals and not python):
            raise _usage(
                f"{text!r} is no engine, or one that was named before",
                "--engine ortgenai --engine vllm=/opt/vllm/bin/python",
            )
        found[name] = {"name": name, "python": Path(python).absolute() if python else None}
    if servers:
        urls = dict(text.split("=", 1) for text in servers if "=" in text)
        if _SERVED not in found or len(urls) != len(servers):
            raise _usage(
                f"servers go by the name of a model, each once, with --engine {_SERVED}",
                f"--engine {_SERVED} --server teacher=http://127.0.0.1:8000",
            )
        found[_SERVED]["servers"] = urls
    return list(found.values())


def models_by_name(named: Sequence[str], *, engines: Sequence[Engine]) -> list[ModelUnderTest]:
    """The models of `NAME=DIR,DIR` arguments: a checkpoint, its ONNX export, or both.

    USAGE for an argument of another form, and where an engine finds nothing of a model that it
    could run. Weights count as they lie in the checkpoint, or else in the export.
    """
    wanted = {e.name: find_plugin(ENGINES, e.name, where="--engine").wants for e in engines}
    models: list[ModelUnderTest] = []
    for text in named:
        name, equals, listed = text.partition("=")
        folders = [Path(part) for part in listed.split(",")]
        if name in (m.name for m in models):
            raise _usage(f"the model {name} is named twice", f"{name}=CHECKPOINT,EXPORT")
        if not equals or not name or not all(f.is_dir() for f in folders):
            raise _usage(
                f"{text!r} is not NAME=DIR, or NAME=DIR,DIR, with folders that are there",
                "teacher=runs/a/stages/correct width=runs/a/stages/width.distill",
            )
        forms = {_form_of(folder): folder for folder in folders}
        if len(forms) < len(folders):
            raise _usage(f"{name} has two folders of one form", f"{name}=CHECKPOINT,EXPORT")
        for engine, form in wanted.items():
            if form not in forms:
                raise _usage(
                    f"{engine} runs {_FORMS.get(form, form)}, and {name} has none",
                    f"{name}=DIR,DIR with the folder of each form",
                )
        kind = TEACHER if name == TEACHER else "student"
        facts = facts_of(forms.get("hf") or folders[0])
        models.append(ModelUnderTest(name, kind, forms, facts))
    return models


_FORMS: Mapping[str, str] = {
    "hf": "a checkpoint", "onnx": "an ONNX export", "trtllm": "a TensorRT-LLM export",
}  # fmt: skip
_TRTLLM_SETTINGS, _TRTLLM_MODEL = "llm_config.yaml", "model"


def _form_of(folder: Path) -> str:
    if (folder / _TRTLLM_SETTINGS).is_file():
        return "trtllm"
    return "onnx" if any(folder.glob("*.onnx")) else "hf"


def _usage(cause: str, fix: str) -> ParetronError:
    return ParetronError(Problem(Code.USAGE, cause, fix=fix))


def facts_of(folder: Path) -> ModelFacts:
    """The facts of a checkpoint, or of an export that keeps its source's config.json."""
    if (folder / _TRTLLM_SETTINGS).is_file():
        folder = folder / _TRTLLM_MODEL
    if (folder / SINGLE).is_file() or (folder / INDEX).is_file():
        return ModelFacts.of(folder)
    weights = sum(p.stat().st_size for p in folder.glob("*.onnx*"))
    return ModelFacts.of_config(read_config(folder), weight_bytes=weights, kv_value_bytes=4)
