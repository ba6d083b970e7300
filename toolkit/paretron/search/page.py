"""What a search found: a picture of the frontier, and a page with its table; no script."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

PICTURE, PAGE = "frontier.svg", "search.html"
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 760, 420, 70, 50, 24, 20
_PLAIN, _FRONT, _TRAINED, _CHOSEN = "#8a93a3", "#0b66b2", "#00756a", "#b84a00"
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;display:block;overflow-x:auto}"
    "th,td{padding:.25rem .6rem;text-align:right;border-bottom:1px solid #d8dce3}"
    "td:first-child,th:first-child{text-align:left}tr.chosen{font-weight:bold}"
    "svg{max-width:100%;height:auto}"
)


def write_page(result: Mapping[str, Any], folder: Path) -> None:
    """Write the picture and the page of a search.json into an existing folder."""
    picture = frontier_svg(result)
    (folder / PICTURE).write_text(picture, "utf-8")
    heads, rows = table(result)
    head = "".join(f"<th scope=col>{escape(h)}</th>" for h in heads)
    body = "".join(
        f"<tr{' class=chosen' if row['chosen'] else ''}>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for row, cells in zip(result["candidates"], rows, strict=True)
    )
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><title>Search</title>"
        f"<style>{_STYLE}</style><h1>Search</h1><p>{escape(summary(result))}</p>"
        f"{picture}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></html>\n"
    )
    (folder / PAGE).write_text(page, "utf-8")


def summary(result: Mapping[str, Any]) -> str:
    """What was searched and chosen, in one paragraph."""
    rows = result["candidates"]
    chosen = next(r for r in rows if r["chosen"])
    trained = sum(bool(r["rounds"]) for r in rows)
    bounds = "; ".join(f"{name} {_bound(b)}" for name, b in result["bounds"].items())
    on = result["ranked_on"]
    said = [
        f"{result['shapes']} shapes, {len(rows)} candidates within the budget ({bounds}),",
        f"ranked by their loss right after pruning on {on['windows']} windows of {on['seq_len']}",
        f"tokens of the {on['text']} text.",
    ]
    if trained:
        tokens = ", ".join(f"{n:,}" for n in result["rounds"])
        said.append(f"{trained} were distilled in rounds of {tokens} tokens.")
    said.append(f"Chosen: {chosen['words']}.")
    return " ".join(said)


def table(result: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Heads and rows of text, the chosen one first; a figure that is absent is a dash."""
    measures = tuple(result["bounds"])
    rounds = [f"loss after {n:,}" for n in result["rounds"]]
    heads = ("shape", *measures, "loss when pruned", "front", *rounds)
    rows = []
    for row in result["candidates"]:
        after = [*row["rounds"], *[None] * len(rounds)][: len(rounds)]
        front = "-" if row["front"] is None else str(row["front"] + 1)
        costs = (_number(row["costs"][m]) for m in measures)
        rows.append((row["words"], *costs, _loss(row["loss"]), front, *map(_loss, after)))
    return heads, rows


def frontier_svg(result: Mapping[str, Any]) -> str:
    """Loss against the first measure of the budget: all candidates, the front, the trained ones."""
    measure = next(iter(result["bounds"]))
    rows = [r for r in result["candidates"] if r["loss"] is not None]
    trained = [(r, loss) for r in rows if (loss := _final(r)) is not None]
    losses = [r["loss"] for r in rows] + [loss for _, loss in trained]
    x = _Scale([r["costs"][measure] for r in rows], _LEFT, _WIDTH - _RIGHT)
    y = _Scale(losses, _HEIGHT - _BOTTOM, _TOP)
    parts = [*_axes(x, y, measure)]
    front = sorted((r for r in rows if r["front"] == 0), key=lambda r: r["costs"][measure])
    line = " ".join(f"{x(r['costs'][measure]):.1f},{y(r['loss']):.1f}" for r in front)
    parts.append(f'<polyline points="{line}" fill="none" stroke="{_FRONT}" stroke-width="1.5"/>')
    for row in rows:
        colour = _FRONT if row["front"] == 0 else _PLAIN
        words = f"{row['words']}: {row['loss']:.3f} when pruned"
        parts.append(_dot(x(row["costs"][measure]), y(row["loss"]), 4, colour, words))
    for row, loss in trained:
        at, colour = x(row["costs"][measure]), _CHOSEN if row["chosen"] else _TRAINED
        parts.append(
            f'<line x1="{at:.1f}" y1="{y(row["loss"]):.1f}" x2="{at:.1f}" y2="{y(loss):.1f}" '
            f'stroke="{colour}" stroke-dasharray="3 3"/>'
        )
        words = f"{row['words']}: {loss:.3f} after {len(row['rounds'])} rounds"
        parts.append(_dot(at, y(loss), 6, colour, words))
    legend = (
        ("candidates", _PLAIN), ("Pareto front", _FRONT), ("trained", _TRAINED),
        ("chosen", _CHOSEN),
    )  # fmt: skip
    for k, (text, colour) in enumerate(legend):
        parts.append(_dot(_LEFT + 12 + 130 * k, 10, 4, colour, text))
        parts.append(f'<text x="{_LEFT + 20 + 130 * k}" y="14" font-size="12">{text}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'font-family="sans-serif"><title>Loss against {escape(measure)}</title>'
        + "".join(parts)
        + "</svg>\n"
    )


class _Scale:
    """Maps values onto a range of the picture, with a little room at both ends."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        self.low, self.high = low - room, high + room
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self._start + share * (self._end - self._start)

    def ticks(self) -> list[float]:
        """About five round values inside."""
        step = 10 ** math.floor(math.log10((self.high - self.low) / 4))
        while (self.high - self.low) / step > 6:
            step *= 2
        first = math.ceil(self.low / step)
        return [k * step for k in range(first, math.floor(self.high / step) + 1)]


def _axes(x: _Scale, y: _Scale, measure: str) -> list[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = [
        f'<path d="M{_LEFT} {_TOP}V{bottom}H{right}" fill="none" stroke="#3b4252"/>',
        f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 10}" text-anchor="middle" '
        f'font-size="13">{escape(measure)}</text>',
        f'<text transform="translate(18 {(bottom + _TOP) / 2}) rotate(-90)" '
        'text-anchor="middle" font-size="13">loss, nats a token</text>',
    ]
    for value in x.ticks():
        at = x(value)
        parts.append(f'<path d="M{at:.1f} {bottom}v5" stroke="#3b4252"/>')
        parts.append(
            f'<text x="{at:.1f}" y="{bottom + 18}" text-anchor="middle" '
            f'font-size="12">{_number(value)}</text>'
        )
    for value in y.ticks():
        at = y(value)
        parts.append(f'<path d="M{_LEFT} {at:.1f}h-5" stroke="#3b4252"/>')
        parts.append(
            f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end" '
            f'font-size="12">{value:.4g}</text>'
        )
    return parts


def _dot(x: float, y: float, radius: int, colour: str, words: str) -> str:
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}" fill-opacity="0.8">'
        f"<title>{escape(words)}</title></circle>"
    )


def _final(row: Mapping[str, Any]) -> float | None:
    last: float | None = row["rounds"][-1] if row["rounds"] else None
    return last


def _bound(bound: Mapping[str, float | None]) -> str:
    least = bound["at_least"]
    most = _number(bound["at_most"])
    return f"at most {most}" if least is None else f"from {_number(least)} to {most}"


def _loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
