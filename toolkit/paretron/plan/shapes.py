"""The sizes of a student, and whether they can be had from its teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from paretron.artifacts.config import refused_shape, relabel
from paretron.errors import Code, ParetronError, Problem
from paretron.families import Family, Sizes
from paretron.families.experts import PER_TOKEN, WIDTH_MULTIPLE, odd_widths
from paretron.families.table import with_sizes
from paretron.recipe import Student

_MEANING = {"ffn": "MLP outside of experts", "experts": "experts", "moe_ffn": "MLP inside experts"}


def student_sizes(teacher: Sizes, target: Student) -> dict[str, int]:
    """The axis sizes that a target asks for; an axis left out keeps the teacher's size.

    `heads` counts query heads over all groups, so the heads a group keeps follow from it.
    """
    kv_heads = target.kv_heads or teacher["kv_heads"]
    heads = target.heads or kv_heads * teacher["q_per_kv"]
    stated = {axis: size for axis, size in target.axes().items() if axis in teacher}
    return {**teacher, **stated, "kv_heads": kv_heads, "q_per_kv": heads // kv_heads}


def target_problems(
    name: str, teacher: Sizes, target: Student, *, family: Family, config: Mapping[str, Any]
) -> list[Problem]:
    """Why a target cannot be had, each with the nearest that can."""
    where = f"students.{name}"
    size = student_sizes(teacher, target)
    problems = [
        *_axis_problems(where, teacher, target, family=family),
        *_expert_problems(where, teacher, size, target, per_token=config.get(PER_TOKEN, 1)),
        *_head_problems(where, teacher, size, target),
    ]
    return problems or _refused(where, teacher, size, family=family, config=config)


def _axis_problems(
    where: str, teacher: Sizes, target: Student, *, family: Family
) -> Iterator[Problem]:
    """Axes that the teacher does not have, or has less of."""
    have = {
        axis: teacher[axis]
        for axis in ("hidden", "ffn", "kv_heads", "layers", "experts", "moe_ffn")
        if axis in teacher
    } | {"heads": teacher["kv_heads"] * teacher["q_per_kv"]}
    stated = target.axes()
    for axis, size in stated.items():
        if axis not in have:
            cause = f"this {family.model_type} has no {_MEANING.get(axis, axis)}"
            yield _problem(f"{where}.{axis}", cause, f"leave it out; it has {', '.join(have)}")
        elif size > have[axis]:
            cause = f"{size} is more than the teacher's {have[axis]}"
            yield _problem(f"{where}.{axis}", cause, f"at most {have[axis]}")
    if stated and all(have.get(axis) == size for axis, size in stated.items()):
        yield _problem(where, "the same shape as the teacher", "a smaller axis")


def _expert_problems(
    where: str, teacher: Sizes, size: Sizes, target: Student, *, per_token: int
) -> Iterator[Problem]:
    """Fewer experts than a token is routed to, and widths that libraries do not run them in."""
    if size.get("experts", per_token) < per_token:
        cause = f"{size['experts']} experts, but every token is routed to {per_token}"
        yield _problem(f"{where}.experts", cause, f"at least {per_token}")
    for axis in odd_widths(size).keys() & target.axes().keys():
        low = size[axis] // WIDTH_MULTIPLE * WIDTH_MULTIPLE
        near = [str(n) for n in (low, low + WIDTH_MULTIPLE) if 0 < n <= teacher[axis]]
        yield _problem(
            f"{where}.{axis}",
            f"{size[axis]} is no multiple of {WIDTH_MULTIPLE}: libraries run experts of other "
            "widths slowly or not at all",
            f"nearest: {' or '.join(near)}" if near else f"leave {axis} out",
        )


def _head_problems(where: str, teacher: Sizes, size: Sizes, target: Student) -> Iterator[Problem]:
    """Query heads that do not fall into groups like the teacher's."""
    heads = target.heads or size["kv_heads"] * size["q_per_kv"]
    kv_heads = size["kv_heads"]
    if heads % kv_heads:
        below, above = heads - heads % kv_heads, heads - heads % kv_heads + kv_heads
        near = [str(h) for h in (below, above) if 0 < h <= kv_heads * teacher["q_per_kv"]]
        yield _problem(
            f"{where}.heads",
            f"{heads} query heads do not divide over {kv_heads} key-value heads",
            f"nearest: {' or '.join(near)}" if near else "fewer kv_heads",
        )
    elif heads // kv_heads > teacher["q_per_kv"]:
        most = kv_heads * teacher["q_per_kv"]
        yield _problem(
            f"{where}.heads",
            f"{heads} query heads over {kv_heads} key-value heads make larger groups than the "
            f"teacher's {teacher['q_per_kv']}",
            f"at most {most} heads, or more kv_heads",
        )


def _refused(
    where: str, teacher: Sizes, size: Sizes, *, family: Family, config: Mapping[str, Any]
) -> list[Problem]:
    """A shape that no config class takes, with the nearest hidden sizes that one does."""
    kept = None if size["layers"] == teacher["layers"] else tuple(range(size["layers"]))
    try:
        new = with_sizes(family, config, size, kept_layers=kept)
    except ParetronError:
        return []  # told by who makes the config
    refused = refused_shape(family, new)
    if refused is None:
        return []
    try:
        relabel(new)
    except ParetronError as error:
        near = [str(h) for h in refused.nearest if h <= teacher["hidden"]]
        fix = f"nearest: {' or '.join(near)}" if near else refused.fix
        return [_problem(f"{where}.hidden", error.problems[0].cause, fix)]
    return []


def _problem(where: str, cause: str, fix: str) -> Problem:
    return Problem(Code.RECIPE_TARGET, cause, where=where, fix=fix)
