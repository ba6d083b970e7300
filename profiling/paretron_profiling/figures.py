"""Numbers as people read them."""

from __future__ import annotations

from paretron_profiling.schema import CLOSED, OFFLINE, OPEN

ABSENT = "–"


def count(value: int | float | None) -> str:
    """Thousands, millions, billions with three digits: 4540469248 -> "4.54 B"."""
    if value is None:
        return ABSENT
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{_three(value / size)}{unit}"
    return f"{value:.0f}"


def size(value: int | float | None) -> str:
    """Bytes in decimal units: 18874368 -> "18.9 MB"."""
    if value is None:
        return ABSENT
    for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= scale:
            return f"{_three(value / scale)} {unit}"
    return f"{value:.0f} B"


def plain(value: float | None, *, digits: int = 3) -> str:
    """A number with so many significant digits, thousands separated, no exponent."""
    if value is None:
        return ABSENT
    if value == 0:
        return "0"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    text = f"{value:.{digits}g}"
    return f"{value:.6f}".rstrip("0") if "e" in text else text


def nats(value: float | None) -> str:
    """A loss."""
    return ABSENT if value is None else f"{value:.3f}"


def signed_nats(value: float | None) -> str:
    """A difference of losses, its sign always shown: "+0.11"."""
    if value is None:
        return ABSENT
    digits = 3 if abs(value) < 0.05 else 2  # close students must not look equal
    return f"{value:+.{digits}f}".replace("-", "−")


def signed(value: float) -> str:
    """A difference with its sign: "−0.021"."""
    return f"{value:+.3f}".replace("-", "−")


def within(low: float | None, high: float | None) -> str:
    """An interval of losses or differences behind its value: " (3.401 to 3.423)"."""
    if low is None or high is None:
        return ""
    return f" ({low:.3f} to {high:.3f})".replace("-", "−")


def hours(seconds: float) -> str:
    """A duration: "3.4 s", "12 min", "5.2 h"."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{_three(seconds / 3600)} h"


def flops(value: float) -> str:
    """Floating-point operations: 4.4e+17 -> "4.40e17"."""
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def milliseconds(seconds: float | None) -> str:
    """A short time given in seconds: 0.0123 -> "12.3 ms"."""
    return ABSENT if seconds is None else f"{plain(1e3 * seconds)} ms"


def percent(value: float | None) -> str:
    """A share: 0.834 -> "83 %"."""
    if value is None:
        return ABSENT
    digits = 1 if abs(value) < 0.0995 else 0
    return f"{100 * value:.{digits}f} %".replace("-", "−")


def times(value: float | None) -> str:
    """A ratio: 1.3821 -> "1.38×"."""
    return ABSENT if value is None else f"{value:.2f}×"


def _three(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def load(mode: str, amount: float) -> str:
    """ "batch 4", "8 in flight" or "2.5 requests/s"."""
    words = {OFFLINE: "batch {:g}", CLOSED: "{:g} in flight", OPEN: "{:g} requests/s"}
    return words[mode].format(amount)
