"""scores.html: heat maps of importance by layer and unit, curves over the layers, and the tables.

One file without scripts or anything from elsewhere; the drawings are SVG.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import torch

from paretron.importance.scores import Scores
from paretron.importance.tables import Table, score_tables
from paretron.recipe import Score

PICTURE = "scores.html"

_COLUMNS = 96  # of a heat map; more units than that are averaged by rank
_WIDTH, _CURVE_HEIGHT, _MARGIN = 720, 200, 44
# From little to much: a scale that grey printers and colour-blind readers can follow.
_SCALE = ((247, 251, 255), (158, 202, 225), (49, 130, 189), (8, 48, 107))
_LINES = ("#08519c", "#d94801", "#238b45", "#6a51a3", "#a50f15", "#525252")
_STYLE = (
    "body{font:14px/1.4 sans-serif;max-width:60em;margin:2em auto;color:#222}"
    "table{border-collapse:collapse;font-variant-numeric:tabular-nums}"
    "td,th{padding:.1em .8em;text-align:right;border-bottom:1px solid #ddd}"
    "svg text{font:11px sans-serif;fill:#444}"
)
_TITLES = {
    "heads": "Attention heads",
    "ffn": "MLP neurons",
    "experts": "Experts",
    "moe_ffn": "Neurons of experts",
    "hidden": "Embedding channels",
}


def scores_page(scores: Scores, score: Score) -> str:
    """The page as one HTML text; the aggregation is that of `score`."""
    parts = [
        f"<h2>{escape(_TITLES.get(axis, axis))}</h2>{_heat_map(scores, axis, score)}"
        for axis in scores.info.axes
    ]
    parts.append(f"<h2>What layers change</h2>{_curves(_distances(scores))}")
    removal = scores.info.losses or scores.info.accuracies
    if removal is not None:
        what = "Loss" if scores.info.losses else "Accuracy"
        blocks = {f"{n} from here on": values for n, values in removal.blocks.items()}
        parts.append(f"<h2>{what} without layers</h2>{_curves(blocks, level=removal.baseline)}")
    for metric, values in scores.info.layer_values.items():
        parts.append(f"<h2>Layers by {metric}</h2>{_curves({metric: values})}")
    parts += [_table(t) for t in score_tables(scores, score)]
    how = f"{score.sequence} over positions, {score.batch} over samples"
    if scores.info.criterion != "activation":
        how = f"units by {scores.info.criterion}"
    head = f"<h1>What matters in this {escape(scores.info.model_type)} model</h1>"
    facts = f"<p>{scores.info.samples} samples, {scores.info.tokens} tokens; {how}.</p>"
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Scores</title>"
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; "
        f"style-src 'unsafe-inline'\"><style>{_STYLE}</style></head><body>"
        f"{head}{facts}{''.join(parts)}</body></html>\n"
    )


def _heat_map(scores: Scores, axis: str, score: Score) -> str:
    """Rows are layers (or norms); units are in their own order, or, where many, by rank."""
    values = scores.places(axis, batch=score.batch, sequence=score.sequence)
    by_rank = values.shape[1] > _COLUMNS
    if by_rank:
        parts = values.sort(dim=1, descending=True).values.tensor_split(_COLUMNS, dim=1)
        values = torch.stack([p.mean(1) for p in parts], dim=1)
    rows, columns = values.shape
    height = max(3, min(14, 420 // rows))
    width = (_WIDTH - _MARGIN) / columns
    shades = (values / values.max().clamp(min=torch.finfo(torch.float64).tiny)).sqrt()
    cells = []
    for r, row in enumerate(shades.tolist()):
        for start, end, colour in _runs([_colour(x) for x in row]):
            cells.append(
                f"<rect x='{_MARGIN + start * width:.1f}' y='{r * height}' "
                f"width='{(end - start) * width + 0.3:.1f}' height='{height}' fill='{colour}'/>"
            )
    label = f"{columns} parts, the most important first" if by_rank else f"{columns} units"
    note = f"<text x='{_MARGIN}' y='{rows * height + 14}'>{label}; the scale is a root</text>"
    ends = f"<text x='0' y='10'>{'first'}</text><text x='0' y='{rows * height}'>last</text>"
    size = f"width='{_WIDTH}' height='{rows * height + 20}'"
    return f"<svg {size} role='img'>{''.join(cells)}{note}{ends}</svg>"


def _runs(colours: Sequence[str]) -> list[tuple[int, int, str]]:
    """Neighbours of one colour, as (start, end, colour)."""
    found: list[tuple[int, int, str]] = []
    for k, colour in enumerate(colours):
        if found and found[-1][2] == colour:
            found[-1] = (found[-1][0], k + 1, colour)
        else:
            found.append((k, k + 1, colour))
    return found


def _colour(share: float) -> str:
    position = min(max(share, 0.0), 1.0) * (len(_SCALE) - 1)
    low = min(int(position), len(_SCALE) - 2)
    mix = position - low
    rgb = (round(a + (b - a) * mix) for a, b in zip(_SCALE[low], _SCALE[low + 1], strict=True))
    return "#" + "".join(f"{c // 8 * 8:02x}" for c in rgb)


def _distances(scores: Scores) -> dict[str, Sequence[float]]:
    lines: dict[str, Sequence[float]] = {}
    for n, values in scores.info.influence.items():
        lines[f"BI of {n}"] = values
    for n, values in scores.info.angular.items():
        lines[f"angle/pi of {n}"] = values
    return lines


def _curves(lines: Mapping[str, Sequence[float]], *, level: float | None = None) -> str:
    """One line each over the first layer of the block; `level` is drawn across."""
    every = [x for values in lines.values() for x in values] + ([level] if level else [])
    low, high = min(every), max(every)
    longest = max(len(values) for values in lines.values())

    def x(i: int) -> float:
        return _MARGIN + i * (_WIDTH - _MARGIN - 10) / max(1, longest - 1)

    def y(value: float) -> float:
        share = (value - low) / (high - low) if high > low else 0.5
        return 10 + (1 - share) * (_CURVE_HEIGHT - 30)

    drawn = []
    for k, (name, values) in enumerate(lines.items()):
        colour = _LINES[k % len(_LINES)]
        points = " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in enumerate(values))
        dashes = "" if k < len(_LINES) else " stroke-dasharray='4 3'"
        drawn.append(
            f"<polyline points='{points}' fill='none' stroke='{colour}'{dashes}/>"
            f"<text x='{_WIDTH + 8}' y='{16 + 14 * k}' style='fill:{colour}'>{escape(name)}</text>"
        )
    if level is not None:
        drawn.append(
            f"<line x1='{_MARGIN}' x2='{_WIDTH - 10}' y1='{y(level):.1f}' y2='{y(level):.1f}' "
            "stroke='#888' stroke-dasharray='2 3'/>"
        )
    axis = (
        f"<text x='0' y='14'>{high:.4g}</text><text x='0' y='{_CURVE_HEIGHT - 16}'>{low:.4g}</text>"
        f"<text x='{_MARGIN}' y='{_CURVE_HEIGHT - 2}'>layer 0</text>"
        f"<text x='{_WIDTH - 60}' y='{_CURVE_HEIGHT - 2}'>layer {longest - 1}</text>"
    )
    height = max(_CURVE_HEIGHT, 20 + 14 * len(lines))
    size = f"width='{_WIDTH + 150}' height='{height}'"
    return f"<svg {size} role='img'>{''.join(drawn)}{axis}</svg>"


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(c)}</th>" for c in table.columns)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(c)}</td>' for c in row)}</tr>" for row in table.rows
    )
    return f"<h2>{escape(table.title)}</h2><table><tr>{head}</tr>{body}</table>"
