"""How fast devices could be, by their names, as their vendors say."""

from __future__ import annotations

# Dense bf16 FLOP/s by a part of the name that the driver gives; the first that fits counts.
_FLOP_S = {
    "H200": 989e12, "H100": 989e12, "H20": 148e12, "B200": 2250e12, "A100": 312e12,
    "L40S": 362e12, "L4": 121e12, "A10": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip


def peak_flop_s(name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU; None for one that the table lacks."""
    return next((rate for known, rate in _FLOP_S.items() if known in name), None)
