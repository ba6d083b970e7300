"""What a teacher said of a text, on disk: a folder that stands in for the teacher.

    capture.json          what was captured, of which teacher and text, and how (`Header`)
    windows-00000.bin ... records of `seq_len` positions a window, windows in order, so many a file
    head.safetensors      lm_head, where hidden states were captured
    manifest.json         sizes and sha256 of all files, as in every artifact

A record is that of `codec`, or the hidden state after the final norm as little-endian numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors.torch import save_file
from torch import Tensor

from paretron.artifacts.headers import read_header
from paretron.artifacts.jsonfile import dump, read_object
from paretron.artifacts.manifest import verify
from paretron.artifacts.tensors import map_entry
from paretron.distill.capture.codec import TopTokensCodec
from paretron.errors import Code, ParetronError, Problem, raise_all
from paretron.recipe.training import Loss

HEADER, HEAD, KIND = "capture.json", "head.safetensors", "capture"
_WEIGHT, _BIAS = "lm_head.weight", "lm_head.bias"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_COUNT = Field(gt=0, le=1 << 48)


class Header(BaseModel):
    """capture.json: hashes of teacher, text and tokenizer, and how the teacher was asked.

    `top_k` tokens were kept at `temperature`, or hidden states of `hidden` channels in `dtype`,
    whose logits follow from the head by `divisor` and `softcap`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    schema_: Literal[1] = Field(default=1, alias="schema")
    teacher: str
    tokens: str
    tokenizer: str
    vocab_size: Annotated[int, Field(gt=1, le=1 << 32)]
    seq_len: Annotated[int, _COUNT]
    documents: Literal["joined", "apart"]
    num_windows: Annotated[int, _COUNT]
    windows_per_file: Annotated[int, _COUNT]
    top_k: Annotated[int, _COUNT] | None = None
    temperature: Annotated[float, Field(gt=0)] = 1.0
    hidden: Annotated[int, _COUNT] | None = None
    dtype: Literal["float32", "bfloat16"]
    divisor: Annotated[float, Field(gt=0)] = 1.0
    softcap: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Header:
        if (self.top_k is None) == (self.hidden is None):
            raise ValueError("holds exactly one of top_k and hidden")
        if self.top_k is not None and self.top_k >= self.vocab_size:
            raise ValueError(f"top_k {self.top_k} of {self.vocab_size} tokens")
        return self

    @property
    def codec(self) -> TopTokensCodec:
        """How the likeliest tokens are written; only where they are."""
        if self.top_k is None:
            raise ValueError("a capture of hidden states")
        return TopTokensCodec(self.vocab_size, self.top_k, self.temperature)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one position."""
        if self.hidden is not None:
            return self.hidden * DTYPES[self.dtype].itemsize
        return self.codec.record_bytes

    @property
    def files(self) -> list[range]:
        """The windows of each file."""
        last, step = self.num_windows, self.windows_per_file
        return [range(first, min(first + step, last)) for first in range(0, last, step)]

    def file_bytes(self, number: int) -> int:
        """The size of a file."""
        return len(self.files[number]) * self.seq_len * self.bytes_per_token

    def dump(self, folder: Path) -> None:
        """Write capture.json."""
        dump(folder / HEADER, self.model_dump(mode="json", by_alias=True))

    @classmethod
    def load(cls, folder: Path) -> Header:
        """Read and check capture.json; INPUT_CONFIG where it is not what this version writes."""
        path = folder / HEADER
        value = read_object(path, code=Code.INPUT_CONFIG)
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise _broken(Code.INPUT_CONFIG, f"{key}: {first['msg']}", path) from error


def is_capture(folder: Path) -> bool:
    """Whether a folder stands in for a teacher, not holds one."""
    return (folder / HEADER).is_file()


def file_name(number: int) -> str:
    """The name of a file of windows."""
    return f"windows-{number:05d}.bin"


@dataclass(frozen=True)
class Cache:
    """The captured windows of one teacher and text."""

    folder: Path
    header: Header

    @classmethod
    def open(cls, folder: Path, *, hashes: bool) -> Cache:
        """Check a folder's header and the sizes of its files; with `hashes` every byte as well.

        That reads the whole folder once, as fast as the disk or a core's sha256 (about 1.5 GB/s).
        Errors: INPUT_CONFIG, INPUT_MANIFEST naming each file.
        """
        header = Header.load(folder)
        sizes = {file_name(n): header.file_bytes(n) for n in range(len(header.files))}
        found = {n: (folder / n).stat().st_size if (folder / n).is_file() else 0 for n in sizes}
        raise_all(
            [
                Problem(
                    Code.INPUT_MANIFEST,
                    f"{found[name]} bytes, not the {size} of {HEADER}",
                    where=str(folder / name),
                    fix="capture again",
                )
                for name, size in sizes.items()
                if found[name] != size
            ][:5]
        )
        if hashes and (kind := verify(folder)["kind"]) != KIND:
            raise _broken(Code.INPUT_MANIFEST, f"holds {kind!r}, not a {KIND}", folder)
        return cls(folder, header)

    def window(self, index: int) -> Tensor:
        """The records of a window, uint8 [seq_len, bytes_per_token]."""
        number, place = divmod(index, self.header.windows_per_file)
        size = self.header.seq_len * self.header.bytes_per_token
        path = self.folder / file_name(number)
        # No map: a large cache has more files than a process may map.
        records = np.fromfile(path, dtype=np.uint8, count=size, offset=place * size)
        return torch.from_numpy(records).view(self.header.seq_len, -1)

    def head(self) -> tuple[Tensor, Tensor | None]:
        """lm_head [vocab, hidden] and its bias; INPUT_MISSING_TENSOR where it is not here."""
        path = self.folder / HEAD
        entries = read_header(path)
        weight, bias = entries.get(_WEIGHT), entries.get(_BIAS)
        if weight is None or weight.shape != (self.header.vocab_size, self.header.hidden):
            raise _broken(Code.INPUT_MISSING_TENSOR, f"no {_WEIGHT} of its size", path)
        return map_entry(weight).clone(), None if bias is None else map_entry(bias).clone()

    def refuse_another(
        self,
        *,
        tokens: str,
        tokenizer: str,
        vocab_size: int,
        seq_len: int,
        num_windows: int,
        apart: bool,
        loss: Loss,
    ) -> None:
        """RUN_MISMATCH naming every field in which a training differs from what was captured."""
        stated: dict[str, object] = {
            "tokens": tokens,
            "tokenizer": tokenizer,
            "vocab_size": vocab_size,
            "seq_len": seq_len,
            "num_windows": num_windows,
            "documents": "apart" if apart else "joined",
        }
        if self.header.top_k is not None:
            stated |= {"top_k": loss.top_k, "temperature": loss.temperature}
        raise_all(mismatches(self.header.model_dump(), stated, where=self.folder / HEADER))


def write_head(folder: Path, weight: Tensor, bias: Tensor | None) -> None:
    """Write lm_head beside hidden states."""
    tensors = {_WEIGHT: weight} if bias is None else {_WEIGHT: weight, _BIAS: bias}
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, folder / HEAD)


def mismatches(there: dict[str, object], here: dict[str, object], *, where: Path) -> list[Problem]:
    """A RUN_MISMATCH for every field of `here` that is another one `there`."""
    return [
        Problem(
            Code.RUN_MISMATCH,
            f"{key} was {str(there[key])[:80]} when the teacher was captured, now it is "
            f"{str(value)[:80]}",
            where=str(where),
            fix="restore it, or capture again",
        )
        for key, value in here.items()
        if there[key] != value
    ]


def _broken(code: Code, cause: str, where: Path) -> ParetronError:
    return ParetronError(Problem(code, cause, where=str(where), fix="capture again"))
