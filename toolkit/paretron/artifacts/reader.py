"""A checkpoint on disk, checked from its headers before any weight is read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretron.artifacts.config import DTYPE_NAMES, read_config_and_notices
from paretron.artifacts.guard import inside
from paretron.artifacts.headers import TensorEntry
from paretron.artifacts.shards import (
    INDEX,
    MAX_OF_A_KIND,
    SINGLE,
    entries_of,
    weight_files,
)
from paretron.artifacts.tensors import check_finite, map_entry
from paretron.artifacts.tokenizer import TOKENIZER, code_notices
from paretron.errors import Code, ParetronError, Problem, raise_all
from paretron.families import Family, expected_tensors, family_of, sizes

if TYPE_CHECKING:
    import torch

__all__ = ["INDEX", "SINGLE", "Checkpoint"]

_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face checkpoint whose names, shapes and offsets agree with its family's table."""

    path: Path
    config: dict[str, Any]
    family: Family
    entries: dict[str, TensorEntry]
    notices: tuple[str, ...] = ()  # what was left out, one sentence each

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Check a checkpoint from its config and headers; every disagreement is one problem."""
        config, notices = read_config_and_notices(path)
        notices += code_notices(path)
        family = family_of(config)
        weights = weight_files(path)
        found = entries_of(weights)
        derived = [n for n in found if n.endswith(family.derived)]
        for name in derived:
            del found[name]
        if weights.ignored:
            notices += (f"not read, another copy of the weights: {_some(weights.ignored)}",)
        if derived:
            notices += (f"left out, the config determines them: {_some(derived)}",)
        if inside(path, TOKENIZER) is None:
            notices += (f"no {TOKENIZER} here: what is made of it cannot be given text",)
        checkpoint = cls(path, config, family, found, notices)
        checkpoint._check_table()
        return checkpoint

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(e.nbytes for e in self.entries.values())

    @property
    def dtype(self) -> str:
        """The safetensors dtype of most of the weights, e.g. "BF16"."""
        by_dtype: dict[str, int] = {}
        for e in self.entries.values():
            by_dtype[e.dtype] = by_dtype.get(e.dtype, 0) + e.nbytes
        return max(by_dtype, key=lambda d: by_dtype[d])

    def read(self, name: str) -> torch.Tensor:
        """One tensor, memory-mapped and not to be written to; INPUT_NONFINITE on NaN or Inf."""
        tensor = self.map(name)
        check_finite(tensor, self.where(name))
        return tensor

    def map(self, name: str) -> torch.Tensor:
        """Like `read`, but no byte is read before it is used, and no value is checked.

        For who keeps a part of it: `check_finite(part, checkpoint.where(name))` is due then.
        """
        return map_entry(self.entries[name])

    def where(self, name: str) -> str:
        """A tensor's place, as errors name it."""
        return f"{self.entries[name].file}: {name}"

    def _check_table(self) -> None:
        expected = expected_tensors(self.family, self.config)
        if self.config.get("tie_word_embeddings") and "lm_head.weight" in self.entries:
            self._drop_tied_head()
        unknown = (
            Problem(
                Code.INPUT_UNKNOWN_TENSOR,
                f"the {self.family.model_type} table has no such tensor",
                where=f"{e.file.name}: {n[:200]}",
                fix="merge adapters and remove quantisation first",
            )
            for n, e in self.entries.items()
            if n not in expected
        )
        missing = (
            Problem(
                Code.INPUT_MISSING_TENSOR,
                f"no such tensor; expected {list(s)} = {self._axes(n)}",
                where=n,
                fix="complete the weights, or correct config.json",
            )
            for n, s in expected.items()
            if n not in self.entries
        )
        shapes = (
            Problem(
                Code.INPUT_SHAPE,
                f"shape {list(self.entries[n].shape)}, expected {list(s)} = {self._axes(n)}",
                where=f"{self.entries[n].file.name}: {n}",
                fix="make config.json and the weights agree",
            )
            for n, s in expected.items()
            if n in self.entries and self.entries[n].shape != s
        )
        dtypes = (
            Problem(
                Code.INPUT_DTYPE,
                f"its values are {e.dtype}",
                where=f"{e.file.name}: {n[:200]}",
                fix=f"start from weights in one of {', '.join(DTYPE_NAMES)}",
            )
            for n, e in self.entries.items()
            if n in expected and e.dtype not in DTYPE_NAMES
        )
        kinds = (unknown, missing, shapes, dtypes)
        raise_all([p for kind in kinds for p in islice(kind, MAX_OF_A_KIND)])

    def _drop_tied_head(self) -> None:
        """A tied checkpoint may still hold lm_head, if it really is the embedding."""
        head, embedding = self.entries["lm_head.weight"], "model.embed_tokens.weight"
        other = self.entries.get(embedding)
        if other is None or not _same_bytes(head, other):
            raise ParetronError(
                Problem(
                    Code.INPUT_TIED,
                    "tie_word_embeddings is true, but lm_head.weight differs from the embedding",
                    where=f"{head.file.name}: lm_head.weight",
                    fix="set tie_word_embeddings to false, or remove lm_head.weight",
                )
            )
        del self.entries["lm_head.weight"]

    def _axes(self, name: str) -> str:
        size = sizes(self.family, self.config)
        row = next(t for t in self.family.tensors if _matches(t.name, name))
        text = row.dims_text
        for axis in sorted(size, key=len, reverse=True):
            text = re.sub(rf"\b{axis}\b", f"{axis}({size[axis]})", text)
        return text


def _matches(pattern: str, name: str) -> bool:
    expression = re.escape(pattern).replace(r"\{i\}", r"\d+").replace(r"\{e\}", r"\d+")
    return re.fullmatch(expression, name) is not None


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(name[:80] for name in names[:3]) + more


def _same_bytes(a: TensorEntry, b: TensorEntry) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    with a.file.open("rb") as one, b.file.open("rb") as other:
        one.seek(a.start)
        other.seek(b.start)
        steps = range(0, a.nbytes, _CHUNK_BYTES)
        sizes = (min(_CHUNK_BYTES, a.nbytes - start) for start in steps)
        return all(one.read(n) == other.read(n) for n in sizes)
