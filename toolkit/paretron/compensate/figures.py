"""What compensation.json holds of a student, in sentences: no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FIGURES = "compensation.json"
_AXES = {"q_per_kv": "query heads", "kv_heads": "key-value heads", "ffn": "MLP"}


def said(figures: Mapping[str, Any]) -> tuple[str, ...]:
    """The losses right after pruning: of the whole student, then of each axis alone."""
    loss, windows = figures["loss"], figures["windows"]["held"]
    whole = (
        f"loss right after pruning, on {windows} calibration windows that nothing was fitted to: "
        f"teacher {loss['teacher']:.3f}, {_pair(loss)}"
    )
    axes = figures.get("axes", {})
    return (whole, *(f"{_AXES.get(axis, axis)} alone: {_pair(one)}" for axis, one in axes.items()))


def _pair(loss: Mapping[str, float]) -> str:
    return f"trimmed {loss['plain']:.3f}, compensated {loss['compensated']:.3f}"
