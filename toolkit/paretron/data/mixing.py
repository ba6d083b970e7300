"""Several texts as one: document by document, each text with its share of the tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from paretron.errors import Code, ParetronError, Problem

Piece = tuple[bool, bool, list[int]]  # begins a document, ends it, its tokens
Encode = Callable[[Iterable[str]], Iterator[Piece]]


@dataclass
class Position:
    """How far a text was read: documents in the pass under way, and tokens in all passes."""

    documents: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Share:
    """A text of a mixture; `name` is for errors, `documents` begins at the first one each time."""

    name: str
    weight: float
    documents: Callable[[], Iterable[str]]
    repeat: bool


@dataclass(frozen=True)
class Mixture:
    """Texts that are read together until there are `max_tokens`."""

    shares: tuple[Share, ...]
    max_tokens: int

    def pieces(
        self, encode: Encode, positions: Sequence[Position] | None = None
    ) -> Iterator[Piece]:
        """Documents whole, always of the text that has the most tokens to its share still to come.

        So wherever the mixture is cut, no text is ahead of its share by more than a document.
        Nothing is drawn: the order in which windows are seen goes by seed. INPUT_CORPUS when a text
        without `repeat` runs out. With `positions` reading goes on from them, and moves each before
        the piece that it includes.
        """
        positions = positions or [Position() for _ in self.shares]
        weights = [share.weight for share in self.shares]

        def behind(k: int) -> tuple[float, float]:
            done = sum(position.tokens for position in positions)
            return done * weights[k] / sum(weights) - positions[k].tokens, weights[k]

        texts = [
            read_from(share.documents(), encode, position)
            for share, position in zip(self.shares, positions, strict=True)
        ]
        while sum(position.tokens for position in positions) < self.max_tokens:
            k = max(range(len(texts)), key=behind)
            ended = False
            while not ended:  # a long document comes in pieces
                piece = next(texts[k], None)
                if piece is None:
                    if not (self.shares[k].repeat and positions[k].tokens):
                        raise self._ran_out(k, positions[k].tokens)
                    positions[k].documents = 0
                    texts[k] = read_from(self.shares[k].documents(), encode, positions[k])
                    continue
                yield piece
                ended = piece[1]

    def _ran_out(self, k: int, tokens: int) -> ParetronError:
        share = self.shares[k].weight / sum(s.weight for s in self.shares)
        return ParetronError(
            Problem(
                Code.INPUT_CORPUS,
                f"holds {tokens} tokens; its share of {self.max_tokens} is "
                f"{round(share * self.max_tokens)}",
                where=self.shares[k].name,
                fix=f"tokens: at most {int(tokens / share)}, a smaller weight, or repeat: true",
            )
        )


def read_from(documents: Iterable[str], encode: Encode, position: Position) -> Iterator[Piece]:
    """The pieces of a text after those documents that were read, which are not encoded again."""
    for piece in encode(islice(documents, position.documents, None)):
        position.documents += piece[1]
        position.tokens += len(piece[2])
        yield piece
