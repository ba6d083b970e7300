"""The texts of a run: where they come from, how they are cut, how much of them is read."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from paretron.recipe.base import Place, Positive, Section, SeqLen, Tokens


class TextSource(Section):
    """Where text comes from: files (.jsonl with "text", or .txt), or a corpus known by name."""

    path: Place | None = None
    corpus: Literal["stdlib"] | None = None
    part: Literal["pretrain", "train", "calibration", "validation"] | None = None

    @model_validator(mode="after")
    def _one_of(self) -> TextSource:
        if (self.path is None) == (self.corpus is None):
            raise ValueError("state exactly one of path and corpus")
        if (self.corpus is None) != (self.part is None):
            raise ValueError("part goes with corpus, and corpus needs a part")
        return self


class TokenisedSource(TextSource):
    """Text cut into windows of `seq_len` tokens; `tokens` bounds how much of it is read."""

    seq_len: SeqLen = 2048
    tokens: Tokens | None = None


class Calibration(TokenisedSource):
    """The text that importance is measured on: `samples` windows drawn by seed."""

    samples: Positive = 1024


class Data(Section):
    """The three texts of a run; they must not overlap for the numbers to mean anything."""

    calibration: Calibration
    train: TokenisedSource
    validation: TokenisedSource
