"""What a checkpoint is and what can become of it, from its config, headers and manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import lcm
from pathlib import Path
from typing import Any

from paretron.artifacts.manifest import MANIFEST, read_manifest, verify
from paretron.artifacts.reader import Checkpoint
from paretron.artifacts.serving import Served, served_by
from paretron.errors import Code
from paretron.families import Family, Sizes, sizes
from paretron.plan.advice import FAST_MULTIPLE, MATRIX_AXES, counted
from paretron.plan.cost import ModelFacts, model_facts
from paretron.plan.shapes import target_problems
from paretron.plugins import EXPORTERS, find_plugin, plugin_names
from paretron.recipe import Export, Student
from paretron.recipe.students import AXES

ONNX_ENGINE = "onnxruntime-genai"


@dataclass(frozen=True)
class Prunable:
    """How far an axis can go down, in steps of what, and in which steps it stays fast."""

    now: int
    least: int
    multiple_of: int
    advised_multiple_of: int

    def as_json(self) -> dict[str, int]:
        """The stable form in `inspect --json`."""
        return {
            "now": self.now,
            "least": self.least,
            "multiple_of": self.multiple_of,
            "advised_multiple_of": self.advised_multiple_of,
        }


@dataclass(frozen=True)
class Inspection:
    """Everything that `inspect` shows."""

    checkpoint: Checkpoint
    facts: ModelFacts
    dtypes: Mapping[str, int]  # safetensors dtype -> bytes
    hashes: str  # "verified", "unverified" or "unknown": no manifest says what they should be
    tokenizer: bool
    prunable: Mapping[str, Prunable]
    engines: tuple[Served, ...]

    def as_json(self) -> dict[str, Any]:
        """The stable form of `inspect --json`."""
        family, config = self.checkpoint.family, self.checkpoint.config
        return {
            "family": family.model_type,
            "architecture": family.architecture,
            "tied": bool(config.get("tie_word_embeddings", False)),
            "tensors": len(self.checkpoint.entries),
            "files": sorted({e.file.name for e in self.checkpoint.entries.values()}),
            "tokenizer": self.tokenizer,
            "dtypes": dict(self.dtypes),
            "integrity": {"headers": "agree", "hashes": self.hashes},
            "prunable": {axis: p.as_json() for axis, p in self.prunable.items()},
            "engines": {s.engine: s.as_json() for s in self.engines},
            "notices": list(self.checkpoint.notices),
        } | self.facts.as_json()


def inspect_model(model: Path, *, hashes: bool = False) -> Inspection:
    """Look at a checkpoint without reading a weight; with `hashes`, compare all with its manifest.

    Errors: those of the guarded reader, INPUT_MANIFEST.
    """
    checkpoint = Checkpoint.open(model)
    known = (model / MANIFEST).is_file()
    if known and hashes:
        verify(model)
    elif known:
        read_manifest(model)  # that it was not edited costs nothing to see
    dtypes: dict[str, int] = {}
    for entry in checkpoint.entries.values():
        dtypes[entry.dtype] = dtypes.get(entry.dtype, 0) + entry.nbytes
    size = sizes(checkpoint.family, checkpoint.config)
    return Inspection(
        checkpoint=checkpoint,
        facts=model_facts(checkpoint.config, dtype=checkpoint.dtype),
        dtypes=dict(sorted(dtypes.items(), key=lambda d: -d[1])),
        hashes=("verified" if hashes else "unverified") if known else "unknown",
        tokenizer=(model / "tokenizer.json").is_file(),
        prunable=prunable_axes(checkpoint.family, checkpoint.config, size),
        engines=(*served_by(checkpoint.config), _onnx(checkpoint.config)),
    )


def prunable_axes(family: Family, config: Mapping[str, Any], size: Sizes) -> dict[str, Prunable]:
    """The axes that students may have smaller, as a recipe names them.

    Found by asking for targets: the first size below the model's that can be had tells the step,
    the first above nothing the least.
    """

    def can_be_had(axis: str, n: int) -> bool:
        target = Student.model_validate({axis: n})
        return not target_problems("x", size, target, family=family, config=config)

    axes = {}
    for axis in AXES:
        now = counted(size, axis)
        near = next((n for n in range(now - 1, 0, -1) if can_be_had(axis, n)), None)
        if near is None:
            continue
        least = next(n for n in range(1, now) if can_be_had(axis, n))
        step = now - near
        advised = lcm(step, FAST_MULTIPLE) if axis in MATRIX_AXES else step
        axes[axis] = Prunable(now, least, step, advised)
    return axes


def _onnx(config: Mapping[str, Any]) -> Served:
    """What the exporter of ONNX Runtime GenAI's format says, where one is installed."""
    if "onnx" not in plugin_names(EXPORTERS):
        return Served(ONNX_ENGINE, "untried", "no exporter called onnx is installed", ())
    exporter = find_plugin(EXPORTERS, "onnx", where="onnx")
    found = exporter.problems(config, export=Export(to="onnx"))
    causes = [p.cause for p in found if p.code is Code.UNSUPPORTED]  # not what is missing here
    if causes:
        return Served(ONNX_ENGINE, "no", "; ".join(causes), ())
    return Served(ONNX_ENGINE, "yes", "", (1,))
