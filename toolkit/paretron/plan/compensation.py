"""What compensating a student costs: passes of both models, sums of products, factors in fp64."""

from __future__ import annotations

from dataclasses import dataclass

from paretron.compensate.decide import Decision
from paretron.families import Sizes
from paretron.plan.cost import ModelFacts
from paretron.plan.hardware import Hardware
from paretron.recipe import Recipe

FP64 = 2  # its operations count as so many
WIDE_ON_GPU = 16  # fp32 there takes as long as so many in bf16, by which a device is rated
_FP32_BYTES, _FP64_BYTES = 4, 8
_HELD_BYTES = 1 << 29  # the program itself, hidden states that are not in files, pieces of tokens


@dataclass(frozen=True)
class Compensation:
    """FLOPs, and the bytes of memory at the peak; nothing where a student is trimmed alone."""

    flops: int = 0
    memory_bytes: int = 0

    def note(self, hardware: Hardware) -> str:
        """What it takes on a machine, and how to do without."""
        slower = WIDE_ON_GPU if hardware.is_gpu else 1
        memory, minutes = self.memory_bytes / 1e9, slower * self.flops / hardware.flop_s / 60
        return (
            f"compensation takes about {memory:.1f} GB of memory and {minutes:.0f} min on "
            f"{hardware.name}; `compensate: {{rotate: false, refit: false}}` trims alone"
        )


def compensation_cost(
    recipe: Recipe, teacher: ModelFacts, student: ModelFacts, decision: Decision
) -> Compensation:
    """Of one student of a stated shape, on the windows of the recipe, as was decided for it.

    The teacher passes once, twice where the stream is rotated; the student once, twice where it is
    refitted. A regression of Y outputs on A inputs takes A^2 + 2AY fp64 operations a token, then
    A^3 / 3 + 2YA^2 to be solved. One layer of either model is in memory at a time, in fp32. Each
    axis that is measured alone takes about as long again.
    """
    settings = recipe.compensate
    if not decision.any:
        return Compensation()
    data = recipe.data.calibration
    tokens = min(data.samples, settings.samples) * data.seq_len
    wide, narrow = teacher.sizes["hidden"], student.sizes["hidden"]
    passes = ((teacher, decision.rotate), (student, decision.refit))
    flops = sum(
        (2 if twice else 1) * model.forward_flops(tokens=tokens, seq_len=data.seq_len)
        for model, twice in passes
    )
    memory = max(_layer_bytes(teacher), _layer_bytes(student))
    if decision.rotate:
        norms = 2 * teacher.sizes["layers"] + 1
        flops += FP64 * (2 * norms * tokens * wide**2 + 10 * wide**3)
        memory = max(memory, 5 * _FP64_BYTES * wide**2)  # eigenvectors and what finds them
    if decision.refit and not decision.means:  # to fit means takes next to nothing
        layers = student.sizes["layers"]
        maps = (2 * layers + 1) * _regression_flops(tokens, narrow, wide)
        writers = layers * sum(_regression_flops(tokens, a, narrow) for a in _inputs(student.sizes))
        flops += FP64 * (maps + writers)
        largest = max(_inputs(student.sizes))
        memory = max(
            memory,
            _half_bytes(student) + _FP64_BYTES * (largest**2 // 2 + largest * narrow),
            _FP64_BYTES * (narrow**2 // 2 + narrow * wide) + _layer_bytes(student),
        )
    if settings.by_axis:
        flops *= 1 + sum(student.sizes[a] != teacher.sizes[a] for a in teacher.sizes)
    return Compensation(flops, memory + _HELD_BYTES)


def _inputs(sizes: Sizes) -> tuple[int, ...]:
    """What the matrices read that write into the stream: heads, and neurons of an MLP or expert."""
    mlp = [sizes[axis] for axis in ("ffn", "moe_ffn") if axis in sizes]
    return (sizes["kv_heads"] * sizes["q_per_kv"] * sizes["head_dim"], max(mlp))


def _regression_flops(tokens: int, inputs: int, outputs: int) -> int:
    summed = tokens * (inputs**2 + 2 * inputs * outputs)
    return summed + inputs**3 // 3 + 2 * outputs * inputs**2


def _layer_bytes(model: ModelFacts) -> int:
    return _FP32_BYTES * model.non_embedding_params // model.sizes["layers"]


def _half_bytes(model: ModelFacts) -> int:
    """The MLP's or the experts' half of a layer: what is not attention's projections."""
    size = model.sizes
    heads = size["head_dim"] * size["kv_heads"] * (2 * size["q_per_kv"] + 2)
    return _layer_bytes(model) - _FP32_BYTES * heads * size["hidden"]
