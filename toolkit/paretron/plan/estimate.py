"""Time, memory and disk of every stage, from counts alone; memory is a lower bound."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from paretron.artifacts.toptokens import TopTokensLayout
from paretron.families.costs import ADAM_BYTES_PER_PARAM, CHECKPOINT_BYTES_PER_PARAM
from paretron.plan.compensation import WIDE_ON_GPU, Compensation
from paretron.plan.correction import correction_cost
from paretron.plan.cost import BYTES_OF, ModelFacts
from paretron.plan.hardware import Hardware
from paretron.plan.stages import Stage, captured_seq_len, token_limits
from paretron.plan.trial import trial_distill
from paretron.recipe import Distill, Recipe, Search, Training

KEPT_CHECKPOINTS = 2
_FP32_BYTES = 4


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
    corrected_weights: int,
    compensations: Mapping[str, Compensation],
) -> dict[str, Estimate]:
    """The estimate of every stage but exports; students that cannot be had cost nothing.

    `candidates` counts the shapes that a student's search ranks, `corrected_weights` what a
    correction of the teacher trains, `compensations` what each student's takes.
    """
    out: dict[str, Estimate] = {}
    for stage in stages:
        student = students.get(stage.student) if stage.student else None
        if stage.student and student is None:
            out[stage.name] = Estimate()
            continue
        compensation = compensations.get(stage.student or "", Compensation())
        flops, memory, disk = _cost(
            stage, recipe, teacher, student, hardware, corrected_weights, compensation
        )
        processes = _processes(stage, recipe) if hardware.is_gpu else 1
        memory = memory // processes + _asked_bytes(stage, recipe, teacher, processes)
        if stage.kind == "search" and student is not None:
            data = recipe.data.validation
            tokens = candidates.get(stage.student or "", 0) * _search(stage, recipe).samples
            flops += student.forward_flops(tokens=tokens * data.seq_len, seq_len=data.seq_len)
        slower = WIDE_ON_GPU if hardware.is_gpu and stage.kind == "prune" else 1
        seconds = slower * flops / hardware.flop_s / processes
        out[stage.name] = Estimate(flops, seconds, memory, disk)
    return out


def _asked_bytes(stage: Stage, recipe: Recipe, teacher: ModelFacts, processes: int) -> int:
    """What the teacher of a distillation takes on each device."""
    if stage.kind == "capture":  # whole in each process
        return teacher.weight_bytes
    if stage.kind == "distill" and recipe.distill.offline is not None:
        hidden = recipe.distill.offline == "hidden"
        return _head_bytes(recipe, teacher) if hidden else 0
    if stage.kind == "distill" and recipe.parallel_correction is not None:
        return 0  # it trains: what it takes is shared, as the student's
    if stage.kind not in ("distill", "trial", "search") or recipe.distill.loss.logits == "none":
        return 0
    part = teacher.weight_bytes // recipe.distill.tensor_parallel
    layers = part * teacher.non_embedding_params // teacher.params
    shares = {
        "replicated": layers,
        "sharded": layers * recipe.distill.tensor_parallel // processes,
        "offloaded": layers // teacher.sizes["layers"],
    }
    return part - layers + shares[recipe.distill.teacher]


def _processes(stage: Stage, recipe: Recipe) -> int:
    """How many devices share a stage's work; those of a CPU are one device all the same."""
    sections: dict[str, Training | None] = {
        "correct": recipe.correct, "distill": recipe.distill, "capture": recipe.distill,
        "trial": recipe.distill,
    }  # fmt: skip
    section = sections.get(stage.kind)
    return section.processes if section else 1


def _cost(
    stage: Stage,
    recipe: Recipe,
    teacher: ModelFacts,
    student: ModelFacts | None,
    hardware: Hardware,
    corrected_weights: int,
    compensation: Compensation,
) -> tuple[int, int, int]:
    """FLOPs, bytes of memory, bytes of disk."""
    match stage.kind:
        case "teacher" if recipe.teacher.pretrain is not None:
            pretrain = recipe.teacher.pretrain
            return _training(teacher, pretrain, pretrain.data.seq_len)
        case "correct" if recipe.correct is not None:
            return correction_cost(
                recipe, teacher, trained=corrected_weights, kept=KEPT_CHECKPOINTS
            )
        case "distill" if student is not None:
            flops, memory, disk = _distilling(
                recipe.distill, teacher, student, recipe.data.train.seq_len
            )
            if recipe.parallel_correction is not None:
                more = correction_cost(
                    recipe, teacher, trained=corrected_weights, kept=KEPT_CHECKPOINTS
                )
                flops, memory, disk = flops + more[0], memory + more[1], disk + more[2]
            return flops, memory, disk
        case "trial" if student is not None:
            return _distilling(trial_distill(recipe), teacher, student, recipe.data.train.seq_len)
        case "decide":  # a copy of the one that goes on
            return 0, 0, teacher.weight_bytes
        case "capture":
            return _capturing(recipe, teacher)
        case "score":
            return _scoring(recipe, teacher, hardware)
        case "search" if student is not None:
            return _halving(_search(stage, recipe), recipe, teacher, student)
        case "prune" if student is not None:
            largest = student.sizes["vocab"] * teacher.sizes["hidden"] * BYTES_OF[teacher.dtype]
            flops, disk = compensation.flops, 0
            memory = max(2 * largest, compensation.memory_bytes)
            if recipe.score.rounds > 1:  # what is scored between them is smaller than the teacher
                each, needed, _ = _scoring(recipe, teacher, hardware)
                flops += (recipe.score.rounds - 1) * each
                memory, disk = max(memory, needed), teacher.weight_bytes
            return flops, memory, disk + student.weight_bytes
        case "data":
            # As many tokens as are named; a text without a bound is read whole, unknown here.
            return 0, 0, 4 * sum(n or 0 for n in token_limits(recipe).values())
        case "evaluate":
            data = recipe.data.validation
            # Windows that slide read most tokens several times.
            read = (data.tokens or 0) * data.seq_len // recipe.evaluate.move(data.seq_len)
            flops = teacher.forward_flops(tokens=read, seq_len=data.seq_len)
            return flops, teacher.weight_bytes, 0
        case _:
            return 0, 0, 0


def _search(stage: Stage, recipe: Recipe) -> Search:
    search = recipe.students[str(stage.student)].search
    if search is None:
        raise ValueError(f"{stage.name} without a search section")
    return search


def _distilling(
    distill: Distill, teacher: ModelFacts, student: ModelFacts, seq_len: int
) -> tuple[int, int, int]:
    flops, memory, disk = _training(student, distill, seq_len)
    if distill.offline is None and distill.loss.logits != "none":
        flops += _forward(teacher, distill, seq_len)
    return flops, memory, disk


def _capturing(recipe: Recipe, teacher: ModelFacts) -> tuple[int, int, int]:
    """One forward pass over the text, and what is kept of each token on disk."""
    tokens, size = token_limits(recipe)["train"] or 0, teacher.sizes
    flops = teacher.forward_flops(tokens=tokens, seq_len=captured_seq_len(recipe))
    if recipe.distill.offline == "hidden":
        kept = size["hidden"] * BYTES_OF[recipe.distill.dtype]
        return flops, 0, tokens * kept + _head_bytes(recipe, teacher)
    kept = TopTokensLayout(size["vocab"], recipe.distill.loss.top_k or 1).record_bytes
    return flops, 0, tokens * kept


def _head_bytes(recipe: Recipe, teacher: ModelFacts) -> int:
    return teacher.sizes["vocab"] * teacher.sizes["hidden"] * BYTES_OF[recipe.distill.dtype]


def _halving(
    search: Search, recipe: Recipe, teacher: ModelFacts, student: ModelFacts
) -> tuple[int, int, int]:
    """Short trainings of candidates, one after the other, half of them in every next round."""
    flops = memory = disk = 0
    left, seq_len = search.keep, recipe.data.train.seq_len
    for tokens in search.rounds:
        training = recipe.distill.model_copy(update={"tokens": tokens, "phases": ()})
        each, memory, disk = _training(student, training, seq_len)
        flops += left * (each + teacher.forward_flops(tokens=tokens, seq_len=seq_len))
        left = (left + 1) // 2
    return flops, memory, disk + student.weight_bytes


def _forward(model: ModelFacts, training: Training, seq_len: int) -> int:
    """FLOPs of a training's forward passes, each phase at its own length."""
    phases = training.phases if isinstance(training, Distill) else ()
    lengths = [(p.tokens, p.seq_len) for p in phases] or [(training.tokens, seq_len)]
    return sum(model.forward_flops(tokens=n, seq_len=length) for n, length in lengths)


def _training(model: ModelFacts, training: Training, seq_len: int) -> tuple[int, int, int]:
    """A backward pass costs two forward passes; AdamW keeps fp32 weights and moments."""
    flops = 3 * _forward(model, training, seq_len)
    memory = ADAM_BYTES_PER_PARAM * model.params
    # The newest checkpoints stay beside the result until the run is done.
    disk = KEPT_CHECKPOINTS * CHECKPOINT_BYTES_PER_PARAM * model.params + model.weight_bytes
    return flops, memory, disk


def _scoring(recipe: Recipe, teacher: ModelFacts, hardware: Hardware) -> tuple[int, int, int]:
    """One pass for the widths, one more for fluctuations, one forward and backward for gradients,
    which stay in fp32; removing each layer or block shares its prefix, so costs half. A model that
    does not fit passes layer by layer, but for gradients; on a CPU it runs in fp32, in each
    process."""
    data, score, depth = recipe.data.calibration, recipe.score, recipe.score.depth
    flops = teacher.forward_flops(tokens=data.samples * data.seq_len, seq_len=data.seq_len)
    ranks_layers = any(s.layer_counts() for s in recipe.students.values())
    gradients = score.needs_gradients(depth=ranks_layers)
    flops *= 1 + (score.criterion == "fluctuation") + 3 * gradients
    weight = BYTES_OF[teacher.dtype] if hardware.is_gpu else _FP32_BYTES
    layer = (teacher.params - teacher.sizes["vocab"] * teacher.sizes["hidden"]) // (
        teacher.sizes["layers"]
    )
    memory = weight * max(layer, teacher.sizes["vocab"] * teacher.sizes["hidden"])
    if gradients or score.placement == "resident":
        memory = (weight + (_FP32_BYTES if gradients else 0)) * teacher.params
    if not hardware.is_gpu:  # of which every process has its own
        memory *= score.processes
    if depth.metric == "loss" and ranks_layers:
        one = teacher.forward_flops(tokens=depth.samples * data.seq_len, seq_len=data.seq_len)
        flops += one * (teacher.sizes["layers"] + 1) // 2
    return flops, memory, 0
