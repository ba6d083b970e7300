"""Will it be faster? Sizes that can be had and that a user would regret, each with a better one.

Nothing here stops a run. A rule says of one axis what is slow or refused there and nothing when it
holds; the nearest sizes that satisfy it, and what they cost in parameters, follow from the rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from paretron.artifacts.config import relabel
from paretron.artifacts.serving import (
    GPU_HEAD_DIMS,
    VLLM_CPU_HEAD_DIMS,
    indivisible,
    tensor_parallel_degrees,
    vllm_limit,
)
from paretron.errors import ParetronError
from paretron.families import Family, Sizes, parameter_counts
from paretron.families.table import with_sizes
from paretron.plan.shapes import student_sizes, target_problems
from paretron.recipe import Student

Level = Literal["advice", "note"]
ONE_MACHINE = 8  # devices
VLLM_HEAD_DIM = "vllm.head_dim"  # where vLLM is to be measured, a problem instead


@dataclass(frozen=True)
class Advice:
    """One finding; `nearest` maps better sizes of the axis to the parameters that they add."""

    rule: str
    level: Level
    where: str
    finding: str
    nearest: Mapping[int, int]

    @property
    def better(self) -> str:
        """The nearest better sizes in words, nothing when there are none."""
        return f"nearest: {' or '.join(map(str, self.nearest))}" if self.nearest else ""

    def as_json(self) -> dict[str, Any]:
        """The stable form in `plan --json`."""
        return {
            "rule": self.rule,
            "level": self.level,
            "where": self.where,
            "finding": self.finding,
            "nearest": [{"size": n, "params": added} for n, added in self.nearest.items()],
        }


@dataclass(frozen=True)
class Model:
    """What rules look at: a teacher, or a student that can be had from it."""

    family: Family
    teacher_config: Mapping[str, Any]
    teacher: Sizes
    target: Student | None  # None: the teacher itself
    name: str
    on_gpu: bool

    @cached_property
    def size(self) -> dict[str, int]:
        """The sizes of its axes."""
        return student_sizes(self.teacher, self.target) if self.target else dict(self.teacher)

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its config, as far as sizes go: which layers stay is not known yet."""
        layers, all_layers = self.size["layers"], self.teacher["layers"]
        kept = tuple(range(layers)) if layers != all_layers else None
        return with_sizes(self.family, self.teacher_config, self.size, kept_layers=kept)

    def of(self, axis: str) -> int:
        """The size of an axis as a recipe counts it: all query heads, not those of a group."""
        return counted(self.size, axis)

    def changed(self, axis: str) -> bool:
        """Whether this is a student in which the axis is smaller."""
        return self.of(axis) != counted(self.teacher, axis)

    def params(self) -> int:
        """How many parameters it has."""
        return parameter_counts(self.family, self.config).total

    def resized(self, axis: str, size: int) -> Model | None:
        """The student with another size of one axis, where that can be had."""
        if self.target is None:
            return None
        changes = {axis: size}
        if axis == "kv_heads":  # the groups stay as large as they are
            changes["heads"] = size * self.size["q_per_kv"]
        target = self.target.model_copy(update=changes)
        problems = target_problems(
            self.name, self.teacher, target, family=self.family, config=self.teacher_config
        )
        return None if problems else replace(self, target=target)


Finding = Callable[[Model, str], str]


@dataclass(frozen=True)
class Rule:
    """One rule over some axes; of those that share the id's first part, the first to fail speaks.

    A rule looks at students whose axis is smaller than the teacher's, on axes that are never pruned
    at the teacher, and at `every` model where more than the axis that it names is involved.
    """

    id: str
    axes: tuple[str, ...]
    finding: Finding
    level: Level = "advice"
    every: bool = False

    @property
    def kind(self) -> str:
        """The id's first part."""
        return self.id.partition(".")[0]

    def looks_at(self, model: Model, axis: str) -> bool:
        """Whether a model's axis is one for this rule."""
        if axis in _NEVER_PRUNED:
            return model.target is None
        return self.every or model.changed(axis)


def _multiple(of: int, why: str) -> Finding:
    def finding(model: Model, axis: str) -> str:
        n = model.of(axis)
        return f"{n} is not a multiple of {of}: {why}" if n % of else ""

    return finding


def _split(model: Model, axis: str) -> str:
    able = tensor_parallel_degrees(model.family, model.teacher)
    lost = [
        d for d in able if d <= ONE_MACHINE and axis in indivisible(model.family, model.size, d)
    ]
    if not lost:
        return ""
    over = ", ".join(map(str, lost))
    return f"{model.of(axis)} cannot be split over {over} devices, as the teacher's can"


def _head_dim(widths: tuple[int, ...], what: str) -> Finding:
    def finding(model: Model, axis: str) -> str:
        known = ", ".join(map(str, widths))
        return "" if model.of(axis) in widths else f"{model.of(axis)}: {what} {known}"

    return finding


def _vllm_cpu(model: Model, axis: str) -> str:
    finding = _head_dim(VLLM_CPU_HEAD_DIMS, "on a CPU, vLLM runs heads of")
    return "" if model.on_gpu else finding(model, axis)


def _relabelled(model: Model, axis: str) -> str:
    try:
        name = relabel(model.config)["model_type"]
    except ParetronError:  # a problem of its own
        return ""
    if name == model.config["model_type"]:
        return ""
    return (
        f"{model.of(axis)} is not a multiple of the {model.of('heads')} heads, which LlamaConfig "
        f"refuses: the student is written as {name}, whose numbers are the same"
    )


def _vllm(model: Model, axis: str) -> str:
    return vllm_limit(model.config)


_NEVER_PRUNED = ("vocab", "head_dim")
MATRIX_AXES = ("hidden", "ffn", "moe_ffn")
FAST_MULTIPLE = 128  # satisfies every rule on tiles
RULES = (
    Rule("tile.16", MATRIX_AXES, _multiple(16, "FP8 matrices need that")),
    Rule("tile.64", MATRIX_AXES, _multiple(64, "a GPU's matrix tiles stay partly empty")),
    Rule(
        "tile.128", MATRIX_AXES, _multiple(FAST_MULTIPLE, "INT4-AWQ and block-wise FP8 need that")
    ),
    Rule("split.devices", ("heads", "kv_heads", "ffn", "moe_ffn"), _split),
    Rule("name.llama", ("hidden",), _relabelled, level="note", every=True),
    Rule(VLLM_HEAD_DIM, ("hidden",), _vllm, every=True),
    Rule("vocab.64", ("vocab",), _multiple(64, "engines pad it, or do not split it over devices")),
    Rule("gpu.head_dim", ("head_dim",), _head_dim(GPU_HEAD_DIMS, "attention on GPUs is made for")),
    Rule("vllm_cpu.head_dim", ("head_dim",), _vllm_cpu),
)


def advise(
    family: Family,
    config: Mapping[str, Any],
    teacher: Sizes,
    students: Mapping[str, Student],
    *,
    on_gpu: bool,
) -> tuple[Advice, ...]:
    """What to think about before training: on the teacher, then on each student that can be had."""
    whole = Model(family, config, teacher, None, "teacher", on_gpu)
    models = [whole, *(replace(whole, target=t, name=n) for n, t in students.items())]
    return tuple(advice for model in models for advice in _about(model))


def _about(model: Model) -> Iterator[Advice]:
    spoken: set[tuple[str, str]] = set()
    for rule in RULES:
        for axis in rule.axes:
            if (rule.kind, axis) in spoken or not rule.looks_at(model, axis):
                continue
            finding = rule.finding(model, axis)
            if finding:
                spoken.add((rule.kind, axis))
                where = model.name if model.target is None else f"students.{model.name}"
                nearest = _nearest(model, rule, axis)
                yield Advice(rule.id, rule.level, f"{where}.{axis}", finding, nearest)


def _nearest(model: Model, rule: Rule, axis: str) -> dict[int, int]:
    """The nearest sizes below and above that satisfy the rule, best with all of its kind."""
    if model.target is None:
        return {}
    alike = [r for r in RULES if r.kind == rule.kind and axis in r.axes]
    return _search(model, axis, alike) or _search(model, axis, [rule])


def _search(model: Model, axis: str, rules: list[Rule]) -> dict[int, int]:
    now, params = model.of(axis), model.params()
    found: dict[int, int] = {}
    for sizes in (range(now - 1, 0, -1), range(now + 1, counted(model.teacher, axis) + 1)):
        for n in sizes:
            other = model.resized(axis, n)
            if other is not None and not any(r.finding(other, axis) for r in rules):
                found[n] = other.params() - params
                break
    return found


def counted(size: Sizes, axis: str) -> int:
    """The size of an axis as a recipe counts it, 0 where the family has none."""
    if axis == "heads":
        return size["kv_heads"] * size["q_per_kv"]
    return size.get(axis, 0)
