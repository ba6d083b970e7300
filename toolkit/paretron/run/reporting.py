"""The report stage: what the run's artifacts hold, gathered into report.json and report.html."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from paretron.artifacts.manifest import MANIFEST, Provenance, read_manifest, versions
from paretron.artifacts.reader import Checkpoint
from paretron.artifacts.staging import staged
from paretron.compensate.figures import FIGURES, said
from paretron.errors import Code, ParetronError, Problem
from paretron.plan.cost import model_facts
from paretron.recipe import Recipe
from paretron.recipe.training import CORRECTED
from paretron.run.measure import PROFILE, kind_of
from paretron.run.runner import Context
from paretron.run.trial import decided, decision_of
from paretron_profiling.machine import hardware
from paretron_profiling.models import TEACHER
from paretron_profiling.report import write_report as write_page

_METRIC = {"cross_entropy": "loss", "forward_kl": "kl"}  # of a training curve
EVALUATION, METRICS, PARITY = "evaluation.json", "metrics.json", "parity.json"


def write_report(context: Context) -> None:
    """Gather the run's numbers and publish the report."""
    content = _content(context)
    with staged(context.out, provenance=context.provenance, overwrite=context.overwrite) as folder:
        write_page(content, out=folder)


def rewrite_report(run: Path) -> Path:
    """Write report.html anew from a run's report.json and return its folder."""
    folder = run / "report"
    if not (folder / "report.json").is_file():
        raise ParetronError(
            Problem(
                Code.INPUT_MISSING,
                "no report/report.json here",
                where=str(run),
                fix="name the folder of a finished `paretron run`",
            )
        )
    manifest = read_manifest(folder)
    provenance = Provenance(
        kind=manifest["kind"],
        parents=manifest["parents"],
        settings=manifest["settings"],
        seed=manifest["seed"],
        stamp=manifest["stamp"],
        stage=manifest["stage"],
        unverified=tuple(manifest.get("unverified", ())),
    )
    content = _json(folder / "report.json")
    with staged(folder, provenance=provenance, overwrite=True) as fresh:
        write_page(content, out=fresh)
    return folder


def _content(context: Context) -> dict[str, Any]:
    recipe = context.recipe
    profile = _json(context.folders["profile"] / PROFILE) if "profile" in context.folders else {}
    names = (TEACHER, *recipe.students)
    return {
        "schema": 1,
        "title": _title(recipe),
        "stamp": context.provenance.stamp,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": recipe.seed,
        "models": [_model(name, context, profile) for name in names],
        "speedup": profile.get("speedup", []),
        "curves": list(_curves(context)),
        "hardware": profile.get("hardware") or hardware(),
        "versions": versions(),
        "engines": profile.get("engines", {}),
        "method": profile.get("method", {}),
        "incomplete": profile.get("incomplete"),
        "captions": [*_captions(context), *_compensation(context), *_unverified(context)],
    }


def _title(recipe: Recipe) -> str:
    given = recipe.teacher.model
    return f"Students of {Path(given).name}" if given else "Students of a pretrained demo teacher"


def _model(name: str, context: Context, profile: Mapping[str, Any]) -> dict[str, Any]:
    recipe = context.recipe
    checkpoint = Checkpoint.open(context.checkpoint(name))
    facts = model_facts(checkpoint.config, dtype=checkpoint.dtype)
    final = _evaluation(context, name, "final")
    before = _evaluation(context, name, "uncorrected" if name == TEACHER else "pruned")
    main = recipe.evaluate.perplexity[0]
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
            "pruned": None if name == TEACHER else before.get(main, {}).get("loss"),
            "final": final.get(main, {}).get("loss"),
        },
        "perplexity": {text: numbers["perplexity"] for text, numbers in final.items()},
        "speed": [
            {k: v for k, v in m.items() if k != "samples"}
            for m in profile.get("models", {}).get(name, [])
        ],
        "artifacts": list(_artifacts(context, name)),
    }


def _evaluation(context: Context, name: str, which: str) -> dict[str, Any]:
    folder = context.folders.get(f"evaluation.{name}.{which}")
    return {} if folder is None else _json(folder / EVALUATION)


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
    main = recipe.evaluate.perplexity[0]
    said = [f"Losses are mean nats a token on the recipe's {main} text."]
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
    main = context.recipe.evaluate.perplexity[0]
    began = _evaluation(context, TEACHER, "final")
    for name in context.recipe.students:
        if ended := _evaluation(context, name, CORRECTED):
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
