"""How a text is cut for a model to read, and whose loss each token's is.

No token is added: what opens a window or a document has nothing before it and is not scored, as
in training. A token that ends a document is one like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

from paretron.data.store import TokenStore
from paretron.errors import Code, ParetronError, Problem
from paretron.recipe import Evaluate


class Span(NamedTuple):
    """`length` tokens from number `first` on, read at once; the last `scored` count for `unit`."""

    unit: int
    first: int
    length: int
    scored: int


Spans = Callable[[], Iterator[Span]]


def spans_of(store: TokenStore, seq_len: int, settings: Evaluate) -> Spans:
    """The spans that a text is cut into, in its order, as often as asked; INPUT_CORPUS for a text
    shorter than one window where windows stand side by side."""
    stride = stride_of(seq_len, settings)
    match settings.by:
        case "window":
            count = store.windows(seq_len)
            return lambda: _windows(count, seq_len)
        case "sliding":
            return lambda: _sliding(store.num_tokens, seq_len, stride)
        case "document":
            return lambda: _documents(store, seq_len, stride)


def stride_of(seq_len: int, settings: Evaluate) -> int:
    """How many tokens a window that slides scores; RECIPE_VALUE when none stands before them."""
    stride = settings.move(seq_len)
    if settings.by != "window" and stride >= seq_len:
        raise ParetronError(
            Problem(
                Code.RECIPE_VALUE,
                f"windows of {seq_len} tokens that move by {stride} leave nothing to read before",
                where="evaluate.stride",
                fix=f"at most {seq_len - 1}",
            )
        )
    return stride


def _windows(count: int, seq_len: int) -> Iterator[Span]:
    """Whole windows side by side; tokens after the last one are left out."""
    for i in range(count):
        yield Span(i, i * seq_len, seq_len, seq_len - 1)


def _sliding(num_tokens: int, seq_len: int, stride: int) -> Iterator[Span]:
    """All tokens but the first, the units as long as windows are."""
    for first, length, scored in _over(num_tokens, seq_len, stride):
        yield Span((first + length - scored) // seq_len, first, length, scored)


def _documents(store: TokenStore, seq_len: int, stride: int) -> Iterator[Span]:
    """All tokens of every document but its first, each document from its own start."""
    starts = [*store.document_starts.tolist(), store.num_tokens]
    unit = 0
    for start, end in pairwise(starts):
        if end - start < 2:  # one token predicts nothing
            continue
        for first, length, scored in _over(end - start, seq_len, stride):
            yield Span(unit, start + first, length, scored)
        unit += 1


def _over(count: int, seq_len: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(first, length, scored) of windows that slide over `count` tokens.

    Each token after the first window's is scored once with at least seq_len - stride before it.
    """
    end = min(seq_len, count)
    if end > 1:
        yield 0, end, end - 1
    while end < count:
        scored = min(stride, count - end)
        end += scored
        yield end - seq_len, seq_len, scored
