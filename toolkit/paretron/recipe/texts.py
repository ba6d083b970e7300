"""The texts of a run: where they come from, how they are cut, how much of them is read."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from paretron.recipe.base import NUMBER, Place, Positive, Section, SeqLen, Tokens

HubId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*/[\w.-]+$", max_length=120)]


class TextSource(Section):
    """Where text comes from: local files, a dataset of the Hugging Face hub, or a known corpus.

    Files are .jsonl or .jsonl.gz (an object a line), .parquet, or .txt (a document a file).
    `column` is the key, or the column, that holds the text. A dataset's `split` is train and its
    `revision` main when left out; its parquet and jsonl files are read, never its code.
    """

    path: Place | None = None
    dataset: HubId | None = None
    config: Place | None = None
    split: Place | None = None
    revision: Place | None = None
    column: Place = "text"
    corpus: Literal["stdlib"] | None = None
    part: Literal["pretrain", "train", "calibration", "validation"] | None = None

    @model_validator(mode="after")
    def _one_of(self) -> TextSource:
        *others, last = places = self._places()
        if sum(bool(place) for place in places.values()) != 1:
            raise ValueError(f"state exactly one of {', '.join(others)} and {last}")
        if (self.corpus is None) != (self.part is None):
            raise ValueError("part goes with corpus, and corpus needs a part")
        of_a_dataset = {"config": self.config, "split": self.split, "revision": self.revision}
        for key, value in of_a_dataset.items():
            if value is not None and self.dataset is None:
                raise ValueError(f"{key} goes with dataset")
        return self

    def _places(self) -> dict[str, object]:
        return {"path": self.path, "dataset": self.dataset, "corpus": self.corpus}


class WeightedSource(TextSource):
    """One of several sources: `weight` over the sum of all weights is its share of the tokens.

    With `repeat` it is read again when it has run out; without, that is an error.
    """

    weight: Annotated[float, NUMBER, Field(gt=0, le=10**9)]
    repeat: bool = False


class TokenisedSource(TextSource):
    """Text cut into windows of `seq_len` tokens; `tokens` bounds how much of it is read.

    In place of one source there may be `sources`, mixed document by document so that each has its
    share of the tokens wherever the mixture is cut; then `tokens` says how many there are in all.
    """

    sources: tuple[WeightedSource, ...] = ()
    seq_len: SeqLen = 2048
    tokens: Tokens | None = None

    @model_validator(mode="after")
    def _a_mixture_has_an_end(self) -> TokenisedSource:
        if self.sources and self.tokens is None:
            raise ValueError("sources go with tokens: how many there are in all")
        return self

    def _places(self) -> dict[str, object]:
        return super()._places() | {"sources": self.sources}

    @property
    def parts(self) -> tuple[TextSource, ...]:
        """What is read: the sources, or this one."""
        return self.sources or (self,)


class TrainingText(TokenisedSource):
    """The text of a training; a window of it may hold several documents.

    `documents`: "joined", each token sees all that stands before it in its window, or "apart", it
    sees its own document alone, positions count from the document's start, and no document's first
    token is learned from the one before it. Validation reads windows joined in both cases.
    A training without stated phases that was stopped goes on with another `seq_len`: what is unread
    of its text is cut into windows of the new length, and nothing is read twice.
    """

    documents: Literal["joined", "apart"] = "joined"


class Calibration(TokenisedSource):
    """The text that importance is measured on: `samples` windows drawn by seed.

    They are drawn from all that is read, so of a dataset `tokens` says how much that is.
    """

    samples: Positive = 1024

    @model_validator(mode="after")
    def _a_dataset_has_an_end(self) -> Calibration:
        if self.dataset is not None and self.tokens is None:
            raise ValueError("dataset goes with tokens: how much is read for samples to draw from")
        return self


class Data(Section):
    """The three texts of a run; they must not overlap for the numbers to mean anything."""

    calibration: Calibration
    train: TrainingText
    validation: TokenisedSource
