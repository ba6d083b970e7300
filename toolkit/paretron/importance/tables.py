"""Scores as tables: one row a layer, and every block of layers that was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from paretron.importance.scores import DepthLosses, Scores
from paretron.recipe import Score

_IN_LAYERS = {"heads": "heads", "kv_heads": "KV groups", "ffn": "MLP neurons", "experts": "experts"}


@dataclass(frozen=True)
class Table:
    """A title, the names of the columns, and rows of text."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def text(self) -> str:
        """The table in columns of equal width, numbers to the right."""
        lines = [self.columns, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        body = ("  ".join(c.rjust(w) for c, w in zip(r, widths, strict=True)) for r in lines)
        return "\n".join((self.title, *body))


def score_tables(scores: Scores, score: Score) -> tuple[Table, ...]:
    """What `paretron score` says: layers, blocks, and how unequal the units of a layer are."""
    tables = [_layers(scores, score)]
    tables += [_blocks(scores, n) for n in scores.info.influence if n > 1]
    removal = scores.info.accuracies or scores.info.losses
    if removal is not None and removal.greedy:
        tables.append(_greedy(removal))
    return tuple(tables)


def spread(values: torch.Tensor) -> float:
    """The share of units that hold half of all importance: 0.5 where all are equal."""
    ordered = values.flatten().sort(descending=True).values
    total = float(ordered.sum())
    if not total:
        return 0.5
    needed = int((ordered.cumsum(0) < total / 2).sum()) + 1
    return needed / len(ordered)


def _layers(scores: Scores, score: Score) -> Table:
    info = scores.info
    axes = [a for a in _IN_LAYERS if scores.observed(a) and (a != "kv_heads" or _grouped(scores))]
    columns = ["layer", "BI", "angle/pi", *info.layer_values, *_removal_columns(scores)]
    columns += [f"{_IN_LAYERS[axis]}: half in" for axis in axes]
    rows = []
    for i in range(info.sizes["layers"]):
        row = [str(i), *_distances(scores, 1, i)]
        row += [f"{values[i]:.4g}" for values in info.layer_values.values()]
        row += _removed(scores, 1, i)
        for axis in axes:
            if not scores.observed(axis, i):
                row.append("")
                continue
            values = scores.values(axis, i, batch=score.batch, sequence=score.sequence)
            row.append(f"{spread(values):.0%}")
        rows.append(tuple(row))
    title = f"layers ({info.samples} samples, {info.tokens} tokens)"
    if info.criterion != "activation":
        title += f"; units by {info.criterion}"
    if info.losses is not None:
        title += f"; loss with all of them {info.losses.baseline:.4f}"
    if info.accuracies is not None:
        title += f"; {info.accuracies.task} with all of them {info.accuracies.baseline:.4f}"
    return Table(title, tuple(columns), tuple(rows))


def _blocks(scores: Scores, n: int) -> Table:
    count = len(scores.info.influence[n])
    rows = [
        (f"{i}-{i + n - 1}", *_distances(scores, n, i), *_removed(scores, n, i))
        for i in range(count)
    ]
    columns = ("layers", "BI", "angle/pi", *_removal_columns(scores))
    return Table(f"blocks of {n} layers", columns, tuple(rows))


def _greedy(removal: DepthLosses) -> Table:
    rows = tuple((str(layer), f"{value:.4f}") for layer, value in removal.greedy)
    return Table("removed one by one", ("layer", "then"), rows)


def _grouped(scores: Scores) -> bool:
    return scores.info.sizes["q_per_kv"] > 1


def _distances(scores: Scores, n: int, i: int) -> list[str]:
    influence, angular = scores.info.influence[n], scores.info.angular.get(n)
    return [f"{influence[i]:.4f}", "" if angular is None else f"{angular[i]:.4f}"]


def _removal_columns(scores: Scores) -> list[str]:
    losses, accuracies = scores.info.losses, scores.info.accuracies
    return (["loss without"] if losses else []) + (["accuracy without"] if accuracies else [])


def _removed(scores: Scores, n: int, i: int) -> Sequence[str]:
    found = [x for x in (scores.info.losses, scores.info.accuracies) if x is not None]
    return [f"{x.blocks[n][i]:.4f}" if n in x.blocks else "" for x in found]
