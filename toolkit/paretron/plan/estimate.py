"""Time, memory and disk of every stage, from counts alone; memory is a lower bound."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from paretron.plan.cost import (
    ADAM_BYTES_PER_PARAM,
    BYTES_OF,
    CHECKPOINT_BYTES_PER_PARAM,
    ModelFacts,
)
from paretron.plan.hardware import Hardware
from paretron.plan.stages import Stage, token_limits
from paretron.recipe import Recipe, Search, Training

KEPT_CHECKPOINTS = 2


@dataclass(frozen=True)
class Estimate:
    """What one stage costs: FLOPs, seconds on the hardware, memory it needs, disk it fills."""

    flops: int = 0
    seconds: float = 0.0
    memory_bytes: int = 0
    disk_bytes: int = 0

    def as_json(self) -> dict[str, Any]:
        """The stable form in `plan --json`."""
        return {
            "flops": self.flops,
            "seconds": round(self.seconds, 1),
            "memory_bytes": self.memory_bytes,
            "disk_bytes": self.disk_bytes,
        }


def estimate_stages(
    stages: tuple[Stage, ...],
    recipe: Recipe,
    teacher: ModelFacts,
    students: Mapping[str, ModelFacts],
    hardware: Hardware,
    *,
    candidates: Mapping[str, int],
) -> dict[str, Estimate]:
    """The estimate of every stage; students that cannot be had cost nothing.

    `candidates` counts the shapes that a student's search ranks.
    """
    out: dict[str, Estimate] = {}
    for stage in stages:
        student = students.get(stage.student) if stage.student else None
        if stage.student and student is None:
            out[stage.name] = Estimate()
            continue
        flops, memory, disk = _cost(stage, recipe, teacher, student)
        if stage.kind == "search" and student is not None:
            data = recipe.data.validation
            tokens = candidates.get(stage.student or "", 0) * _search(stage, recipe).samples
            flops += student.forward_flops(tokens=tokens * data.seq_len, seq_len=data.seq_len)
        processes = _processes(stage, recipe) if hardware.is_gpu else 1
        seconds = flops / hardware.flop_s / processes
        out[stage.name] = Estimate(flops, seconds, memory // processes, disk)
    return out


def _processes(stage: Stage, recipe: Recipe) -> int:
    """How many devices share a stage's work; those of a CPU are one device all the same."""
    sections: dict[str, Training | None] = {"correct": recipe.correct, "distill": recipe.distill}
    section = sections.get(stage.kind)
    return section.processes if section else 1


def _cost(
    stage: Stage, recipe: Recipe, teacher: ModelFacts, student: ModelFacts | None
) -> tuple[int, int, int]:
    """FLOPs, bytes of memory, bytes of disk."""
    match stage.kind:
        case "teacher" if recipe.teacher.pretrain is not None:
            pretrain = recipe.teacher.pretrain
            return _training(teacher, pretrain, pretrain.data.seq_len)
        case "correct" if recipe.correct is not None:
            return _training(teacher, recipe.correct, recipe.data.train.seq_len)
        case "distill" if student is not None:
            seq_len = recipe.data.train.seq_len
            flops, memory, disk = _training(student, recipe.distill, seq_len)
            flops += teacher.forward_flops(tokens=recipe.distill.tokens, seq_len=seq_len)
            return flops, memory + teacher.weight_bytes, disk
        case "score":
            return _scoring(recipe, teacher)
        case "search" if student is not None:
            return _halving(_search(stage, recipe), recipe, teacher, student)
        case "prune" if student is not None:
            largest = student.sizes["vocab"] * teacher.sizes["hidden"] * BYTES_OF[teacher.dtype]
            return _compensating(recipe, teacher, student), 2 * largest, student.weight_bytes
        case "data":
            # As many tokens as are named; a text without a bound is read whole, unknown here.
            return 0, 0, 4 * sum(n or 0 for n in token_limits(recipe).values())
        case "export":
            facts = student or teacher
            return 0, 2 * facts.weight_bytes, facts.weight_bytes
        case "evaluate":
            data = recipe.data.validation
            flops = teacher.forward_flops(tokens=data.tokens or 0, seq_len=data.seq_len)
            return flops, teacher.weight_bytes, 0
        case _:
            return 0, 0, 0


def _compensating(recipe: Recipe, teacher: ModelFacts, student: ModelFacts) -> int:
    """At most two passes of the teacher and five of the student; trimming alone costs none."""
    data, compensate = recipe.data.calibration, recipe.compensate
    if not (compensate.rotate or compensate.refit):
        return 0
    tokens = min(data.samples, compensate.samples) * data.seq_len
    return 2 * teacher.forward_flops(tokens=tokens, seq_len=data.seq_len) + (
        5 * student.forward_flops(tokens=tokens, seq_len=data.seq_len)
    )


def _search(stage: Stage, recipe: Recipe) -> Search:
    search = recipe.students[str(stage.student)].search
    if search is None:
        raise ValueError(f"{stage.name} without a search section")
    return search


def _halving(
    search: Search, recipe: Recipe, teacher: ModelFacts, student: ModelFacts
) -> tuple[int, int, int]:
    """Short trainings of candidates, one after the other, half of them in every next round."""
    flops = memory = disk = 0
    left, seq_len = search.keep, recipe.data.train.seq_len
    for tokens in search.rounds:
        training = recipe.distill.model_copy(update={"tokens": tokens})
        each, memory, disk = _training(student, training, seq_len)
        flops += left * (each + teacher.forward_flops(tokens=tokens, seq_len=seq_len))
        left = (left + 1) // 2
    return flops, memory + teacher.weight_bytes, disk + student.weight_bytes


def _training(model: ModelFacts, training: Training, seq_len: int) -> tuple[int, int, int]:
    """A backward pass costs two forward passes; AdamW keeps fp32 weights and moments."""
    flops = 3 * model.forward_flops(tokens=training.tokens, seq_len=seq_len)
    memory = ADAM_BYTES_PER_PARAM * model.params
    # The newest checkpoints stay beside the result until the run is done.
    disk = KEPT_CHECKPOINTS * CHECKPOINT_BYTES_PER_PARAM * model.params + model.weight_bytes
    return flops, memory, disk


def _scoring(recipe: Recipe, teacher: ModelFacts) -> tuple[int, int, int]:
    """One pass for the widths; removing each layer or block shares its prefix, so costs half."""
    data, depth = recipe.data.calibration, recipe.score.depth
    flops = teacher.forward_flops(tokens=data.samples * data.seq_len, seq_len=data.seq_len)
    if depth.metric == "loss" and any(s.layer_counts() for s in recipe.students.values()):
        one = teacher.forward_flops(tokens=depth.samples * data.seq_len, seq_len=data.seq_len)
        flops += one * (teacher.sizes["layers"] + 1) // 2
    return flops, teacher.weight_bytes, 0
