"""The report stage: what the run's artifacts hold, gathered into one report."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from paretron.artifacts.manifest import MANIFEST, read_manifest, versions
from paretron.artifacts.reader import Checkpoint
from paretron.artifacts.staging import staged
from paretron.compensate.figures import FIGURES, said
from paretron.evaluate.differences import differences
from paretron.plan.cost import ModelFacts, model_facts
from paretron.recipe import Recipe
from paretron.recipe.training import CORRECTED
from paretron.run.costs import EVENTS, run_cost
from paretron.run.importances import importance_summary
from paretron.run.measure import PROFILE, kind_of
from paretron.run.runner import Context
from paretron.run.trial import decided, decision_of
from paretron_profiling.goals import judged
from paretron_profiling.machine import hardware
from paretron_profiling.models import TEACHER
from paretron_profiling.report.page import write_report as write_page

_METRIC = {"cross_entropy": "loss", "forward_kl": "kl"}  # of a training curve
EVALUATION, METRICS, PARITY = "evaluation.json", "metrics.json", "parity.json"


def write_report(context: Context) -> None:
    """Gather the run's numbers and publish the report."""
    content = _content(context)
    with staged(context.out, provenance=context.provenance, overwrite=context.overwrite) as folder:
        write_page(content, out=folder)


def _content(context: Context) -> dict[str, Any]:
    recipe = context.recipe
    profile = _json(context.folders["profile"] / PROFILE) if "profile" in context.folders else {}
    names = (TEACHER, *recipe.students)
    facts = {name: _facts(context, name) for name in names}
    models = [_model(name, context, profile, facts[name]) for name in names]
    judges = {name: _judged(context, name, "final") for name in names}
    return {
        "schema": 1,
        "title": _title(recipe),
        "stamp": context.provenance.stamp,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": recipe.seed,
        "models": models,
        "speedup": profile.get("speedup", []),
        "curves": list(_curves(context)),
        "goals": judged(
            recipe.goals,
            models=models,
            profile=profile,
            evaluations=judges,
            differences={m["name"]: m["differences"] for m in models},
        ),
        "roofline": profile.get("roofline"),
        "device": profile.get("device"),
        "memory": profile.get("memory", []),
        "importance": importance_summary(context.folders["scores"], recipe.score),
        "cost": run_cost(context.out.parent / EVENTS, plan=context.plan, facts=facts),
        "hardware": profile.get("hardware") or hardware(),
        "versions": versions(),
        "engines": profile.get("engines", {}),
        "method": profile.get("method", {}),
        "incomplete": profile.get("incomplete"),
        "captions": [*_captions(context), *_compensation(context), *_unverified(context)],
        "raw": list(_raw(context)),
    }


def _raw(context: Context) -> Iterator[dict[str, Any]]:
    """Where the profile's samples lie, seen from the report's folder."""
    if "profile" in context.folders:
        folder = context.folders["profile"]
        yield {
            "path": Path(os.path.relpath(folder / PROFILE, context.out)).as_posix(),
            "sha256": read_manifest(folder)["files"][PROFILE]["sha256"],
        }


def _facts(context: Context, name: str) -> ModelFacts:
    checkpoint = Checkpoint.open(context.checkpoint(name))
    return model_facts(checkpoint.config, dtype=checkpoint.dtype)


def _title(recipe: Recipe) -> str:
    given = recipe.teacher.model
    return f"Students of {Path(given).name}" if given else "Students of a pretrained demo teacher"


def _model(
    name: str, context: Context, profile: Mapping[str, Any], facts: ModelFacts
) -> dict[str, Any]:
    recipe = context.recipe
    checkpoint = Checkpoint.open(context.checkpoint(name))
    judged_on = _judged(context, name, "final")
    final = judged_on.get("texts", {})
    before = _evaluation(context, name, "uncorrected" if name == TEACHER else "pruned")
    main = _main_text(recipe)
    return {
        "name": name,
        "kind": TEACHER if name == TEACHER else kind_of(recipe.students[name]),
        "params": facts.params,
        "non_embedding_params": facts.non_embedding_params,
        "weight_bytes": checkpoint.nbytes,
        "kv_bytes_per_token": facts.kv_bytes_per_token,
        "shape": {
            "layers": facts.sizes["layers"],
            "hidden": facts.sizes["hidden"],
            "heads": facts.sizes["kv_heads"] * facts.sizes["q_per_kv"],
            "kv_heads": facts.sizes["kv_heads"],
            **{a: n for a, n in facts.sizes.items() if a in ("ffn", "experts", "moe_ffn")},
        },
        "loss": {
            # A teacher is not pruned; what it lost before correction stands in the captions.
            "pruned": None if name == TEACHER else before.get(str(main), {}).get("loss"),
            "final": final.get(str(main), {}).get("loss"),
        },
        "perplexity": {text: numbers["perplexity"] for text, numbers in final.items()},
        "texts": final,
        "tasks": judged_on.get("tasks", {}),
        "left_out": judged_on.get("left_out", {}),
        "differences": _differences(context, name),
        "speed": [
            {k: v for k, v in m.items() if k != "samples"}
            for m in profile.get("models", {}).get(name, [])
        ],
        "artifacts": list(_artifacts(context, name)),
        "sha256": context.provenance.parents.get(f"artifact.{name}.hf"),
    }


def _main_text(recipe: Recipe) -> str | None:
    """The text that a model's loss is of: the first one; None where tasks alone are asked."""
    return next(iter(recipe.evaluate.perplexity), None)


def _differences(context: Context, name: str) -> dict[str, Any]:
    """Student minus teacher on every text and task, in pairs."""
    teacher, own = (context.folders.get(f"evaluation.{n}.final") for n in (TEACHER, name))
    if name == TEACHER or teacher is None or own is None:
        return {}
    return differences(teacher, own)


def _judged(context: Context, name: str, which: str) -> dict[str, Any]:
    """A model's evaluation, whole."""
    folder = context.folders.get(f"evaluation.{name}.{which}")
    return {} if folder is None else _json(folder / EVALUATION)


def _evaluation(context: Context, name: str, which: str) -> dict[str, Any]:
    """What a model's evaluation found on every text."""
    return dict(_judged(context, name, which).get("texts", {}))


def _artifacts(context: Context, name: str) -> Iterator[dict[str, Any]]:
    root = context.out.parent
    for role, folder in context.folders.items():
        if not role.startswith(f"artifact.{name}."):
            continue
        checks = _json(folder / PARITY)["checks"] if (folder / PARITY).is_file() else []
        listed = read_manifest(folder)["files"] if (folder / MANIFEST).is_file() else {}
        yield {
            "to": role.rpartition(".")[2],
            "path": str(folder.relative_to(root)) if folder.is_relative_to(root) else str(folder),
            "bytes": sum(f["bytes"] for f in listed.values()) or None,
            "checks": checks,
        }


def _curves(context: Context) -> Iterator[dict[str, Any]]:
    for role, folder in context.folders.items():
        if not role.startswith("curve."):
            continue
        metrics = _json(folder / METRICS)
        stage = "correct" if role == "curve.correct" else "distill"
        model = TEACHER if stage == "correct" else role.removeprefix("curve.")
        learned = _METRIC.get(metrics["objective"], metrics["objective"])
        if corrected := [p for p in metrics["train"] if "teacher_loss" in p]:
            yield {
                "model": model,
                "stage": "correct",
                "metric": "loss",
                "split": "train",
                "tokens": [p["tokens"] for p in corrected],
                "values": [p["teacher_loss"] for p in corrected],
            }
        for split, metric in (("train", learned), ("validation", "loss")):
            points = metrics[split]
            yield {
                "model": model,
                "stage": stage,
                "metric": metric,
                "split": split,
                "tokens": [p["tokens"] for p in points],
                "values": [p["loss"] for p in points],
            }


def _captions(context: Context) -> list[str]:
    recipe = context.recipe
    decision = decision_of(context.checkpoint(TEACHER))
    main = _main_text(recipe)
    said = [f"Losses are mean nats a token on the recipe's {main} text."] if main else []
    trained = f"Each student was distilled on {recipe.distill.tokens:,} tokens"
    if recipe.serial_correction and (decision is None or decision["goes_on"] == "corrected"):
        trained += f", the teacher corrected on {recipe.serial_correction.tokens:,} tokens before"
    if recipe.parallel_correction:
        corrected = f"{recipe.parallel_correction.tokens:,} tokens"
        trained += f", a copy of the teacher corrected along with it, on {corrected}"
    return [
        *said,
        trained + ".",
        *([decided(decision)] if decision else []),
        *_corrected_along(context),
    ]


def _corrected_along(context: Context) -> Iterator[str]:
    """What became of each student's own copy of the teacher."""
    main = _main_text(context.recipe)
    began = _evaluation(context, TEACHER, "final")
    for name in context.recipe.students:
        if (ended := _evaluation(context, name, CORRECTED)) and main is not None:
            losses = f"{began[main]['loss']:.3f} to {ended[main]['loss']:.3f}"
            yield f"{name}: its copy of the teacher went from {losses} nats a token."


def _compensation(context: Context) -> Iterator[str]:
    """What compensating each student did before any training."""
    for role, folder in context.folders.items():
        if role.startswith("pruned.") and (folder / FIGURES).is_file():
            figures = _json(folder / FIGURES)
            yield f"{role.removeprefix('pruned.')}: {'; '.join(said(figures))}."


def _unverified(context: Context) -> list[str]:
    """A sentence on the models that no checksum vouched for when they were read."""
    made = [read_manifest(f) for f in context.folders.values() if (f / MANIFEST).is_file()]
    roles = sorted({role for manifest in made for role in manifest.get("unverified", ())})
    if not roles:
        return []
    return [f"Unverified: no checksum is known of the files given as {', '.join(roles)}."]


def _json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return content
