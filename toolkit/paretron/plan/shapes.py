"""The sizes of a student, and whether they can be had from its teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paretron.errors import Code, Problem
from paretron.families import Family, Sizes
from paretron.recipe import Student


def student_sizes(teacher: Sizes, target: Student) -> dict[str, int]:
    """The axis sizes that a target asks for; an axis left out keeps the teacher's size.

    `heads` counts query heads over all groups, so the heads a group keeps follow from it.
    """
    kv_heads = target.kv_heads or teacher["kv_heads"]
    heads = target.heads or kv_heads * teacher["q_per_kv"]
    return {
        **teacher,
        "hidden": target.hidden or teacher["hidden"],
        "ffn": target.ffn or teacher["ffn"],
        "layers": target.layers or teacher["layers"],
        "kv_heads": kv_heads,
        "q_per_kv": heads // kv_heads,
    }


def target_problems(
    name: str, teacher: Sizes, target: Student, *, family: Family, config: Mapping[str, Any]
) -> list[Problem]:
    """Why a target cannot be had, each with the nearest that can."""
    where = f"students.{name}"
    wanted = target.model_dump(exclude_none=True)
    have = {
        "hidden": teacher["hidden"],
        "ffn": teacher["ffn"],
        "heads": teacher["kv_heads"] * teacher["q_per_kv"],
        "kv_heads": teacher["kv_heads"],
        "layers": teacher["layers"],
    }
    problems = [
        _problem(
            f"{where}.{axis}",
            f"{size} is more than the teacher's {have[axis]}",
            f"at most {have[axis]}",
        )
        for axis, size in wanted.items()
        if size > have[axis]
    ]
    if wanted and all(wanted[axis] == have[axis] for axis in wanted):
        problems.append(_problem(where, "the same shape as the teacher", "a smaller axis"))
    size = student_sizes(teacher, target)
    heads = target.heads or size["kv_heads"] * size["q_per_kv"]
    kv_heads = size["kv_heads"]
    if heads % kv_heads:
        below, above = heads - heads % kv_heads, heads - heads % kv_heads + kv_heads
        near = [str(h) for h in (below, above) if 0 < h <= kv_heads * teacher["q_per_kv"]]
        problems.append(
            _problem(
                f"{where}.heads",
                f"{heads} query heads do not divide over {kv_heads} key-value heads",
                f"nearest: {' or '.join(near)}" if near else "fewer kv_heads",
            )
        )
    elif heads // kv_heads > teacher["q_per_kv"]:
        most = kv_heads * teacher["q_per_kv"]
        problems.append(
            _problem(
                f"{where}.heads",
                f"{heads} query heads over {kv_heads} key-value heads make larger groups than the "
                f"teacher's {teacher['q_per_kv']}",
                f"at most {most} heads, or more kv_heads",
            )
        )
    if family.model_type == "llama" and size["hidden"] % max(1, heads):
        biased = [k for k in ("attention_bias", "mlp_bias") if config.get(k)]
        if biased:
            step = heads
            low = size["hidden"] // step * step
            problems.append(
                _problem(
                    f"{where}.hidden",
                    f"LlamaConfig refuses hidden {size['hidden']} with {heads} heads, and "
                    f"{biased[0]} rules out the Mistral name",
                    f"nearest: {low} or {low + step}",
                )
            )
    return problems


def _problem(where: str, cause: str, fix: str) -> Problem:
    return Problem(Code.RECIPE_TARGET, cause, where=where, fix=fix)
