"""Several texts as one: document by document, each text with its share of the tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from paretron.errors import Code, ParetronError, Problem

Piece = tuple[bool, bool, list[int]]  # begins a document, ends it, its tokens
Encode = Callable[[Iterable[str]], Iterator[Piece]]


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

    def pieces(self, encode: Encode) -> Iterator[Piece]:
        """Documents whole, always of the text that has the most tokens to its share still to come.

        So wherever the mixture is cut, no text is ahead of its share by more than a document.
        Nothing is drawn: the order in which windows are seen goes by seed. INPUT_CORPUS when a text
        without `repeat` runs out.
        """
        tokens = [0] * len(self.shares)
        weights = [share.weight for share in self.shares]

        def behind(k: int) -> tuple[float, float]:
            return sum(tokens) * weights[k] / sum(weights) - tokens[k], weights[k]

        texts = [encode(share.documents()) for share in self.shares]
        while sum(tokens) < self.max_tokens:
            k = max(range(len(texts)), key=behind)
            ended = False
            while not ended:  # a long document comes in pieces
                piece = next(texts[k], None)
                if piece is None:
                    if not (self.shares[k].repeat and tokens[k]):
                        raise self._ran_out(k, tokens[k])
                    texts[k] = encode(self.shares[k].documents())
                    continue
                yield piece
                tokens[k] += len(piece[2])
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
