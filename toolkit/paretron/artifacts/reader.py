"""A checkpoint on disk, checked from its headers before any weight is read."""

from __future__ import annotations

import mmap
import os
import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretron.artifacts.config import read_config
from paretron.artifacts.headers import TensorEntry, read_header
from paretron.artifacts.jsonfile import read_object
from paretron.errors import Code, ParetronError, Problem, raise_all
from paretron.families import Family, expected_tensors, family_of, sizes

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_AGAIN = "restore the index and the shards from where the model came"
_MAX_OF_A_KIND = 20  # problems told at once: a wrong config may cause thousands
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face checkpoint whose names, shapes and offsets agree with its family's table."""

    path: Path
    config: dict[str, Any]
    family: Family
    entries: dict[str, TensorEntry]

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Check a checkpoint from its config and headers; every disagreement is one problem."""
        config = read_config(path)
        family = family_of(config)
        found: dict[str, TensorEntry] = {}
        for file in _weight_files(path):
            for name, entry in read_header(file).items():
                if name in found:
                    raise ParetronError(
                        Problem(
                            Code.INPUT_INDEX,
                            f"the tensor stands in {found[name].file.name} and in {file.name}",
                            where=name[:200],
                            fix=_AGAIN,
                        )
                    )
                found[name] = entry
        _check_index(path, found)
        found = {n: e for n, e in found.items() if not n.endswith(family.derived)}
        checkpoint = cls(path, config, family, found)
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
        import torch

        entry = self.entries[name]
        dtype = _torch_dtype(entry.dtype)
        if entry.nbytes == 0:
            return torch.empty(entry.shape, dtype=dtype)
        page = entry.start - entry.start % mmap.ALLOCATIONGRANULARITY
        with entry.file.open("rb") as f:
            # A private mapping: torch wants writable memory, the file must never change.
            memory = mmap.mmap(
                f.fileno(), entry.start - page + entry.nbytes, offset=page, access=mmap.ACCESS_COPY
            )
        flat = torch.frombuffer(
            memory, dtype=dtype, count=entry.nbytes // dtype.itemsize, offset=entry.start - page
        )
        tensor = flat.view(entry.shape)
        if dtype.is_floating_point and not _all_finite(tensor):
            count = int((~torch.isfinite(tensor.float())).sum())
            raise ParetronError(
                Problem(
                    Code.INPUT_NONFINITE,
                    f"{count} of {tensor.numel()} values are NaN or infinite",
                    where=f"{entry.file}: {name}",
                    fix="use a checkpoint whose training did not diverge",
                )
            )
        return tensor

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
        raise_all([p for kind in (unknown, missing, shapes) for p in islice(kind, _MAX_OF_A_KIND)])

    def _drop_tied_head(self) -> None:
        """A tied checkpoint may still hold lm_head, if it really is the embedding."""
        head, embedding = self.entries["lm_head.weight"], "model.embed_tokens.weight"
        other = self.entries.get(embedding)
        if other is None or _digest(head) != _digest(other):
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


def _weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, by index or alone; nothing outside of the folder."""
    if (folder / INDEX).is_file():
        index = read_object(folder / INDEX, code=Code.INPUT_INDEX)
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ParetronError(
                Problem(Code.INPUT_INDEX, "no weight_map", where=str(folder / INDEX), fix=_AGAIN)
            )
        names = sorted({str(v) for v in weight_map.values()})
        stray = sorted(
            p.name for p in folder.glob("model-*-of-*.safetensors") if p.name not in names
        )
        if stray:
            raise ParetronError(
                Problem(
                    Code.INPUT_INDEX,
                    "a shard that the index does not name",
                    where=str(folder / stray[0]),
                    fix="remove it, or restore the index that belongs to it",
                )
            )
        return [_inside(folder, name) for name in names]
    if (folder / SINGLE).is_file():
        return [_inside(folder, SINGLE)]
    pickles = sorted(p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt*")))
    if pickles:
        raise ParetronError(
            Problem(
                Code.INPUT_PICKLE,
                "the weights are pickled, which can run code when opened",
                where=str(folder / pickles[0]),
                fix="convert them to safetensors where you trust them, then come back",
            )
        )
    raise ParetronError(
        Problem(
            Code.INPUT_MISSING,
            "config.json is here, but no safetensors weights",
            where=str(folder),
            fix=f"add {SINGLE}, or shards with {INDEX}",
        )
    )


def _inside(folder: Path, name: str) -> Path:
    """The file of that name: a plain name, a regular file, inside the folder or its hub cache."""
    if not _SAFE_NAME.fullmatch(name):
        raise ParetronError(
            Problem(
                Code.INPUT_UNSAFE_PATH,
                f"{name[:80]!r} is not a plain file name",
                where=str(folder / INDEX),
                fix="take the model from a source you trust: an index names shards beside itself",
            )
        )
    path = folder / name
    if not path.is_file():
        raise ParetronError(
            Problem(
                Code.INPUT_INDEX,
                "the index names this shard, but it is not here",
                where=str(path),
                fix="finish the download",
            )
        )
    real, roots = Path(os.path.realpath(path)), [Path(os.path.realpath(folder))]
    if folder.resolve().parent.name == "snapshots":  # a hub cache links to the blobs beside it
        roots.append(folder.resolve().parent.parent / "blobs")
    if not any(real.is_relative_to(root) for root in roots):
        raise ParetronError(
            Problem(
                Code.INPUT_UNSAFE_PATH,
                "the shard is a link out of the folder",
                where=str(path),
                fix="copy the file that it links to into the folder",
            )
        )
    return path


def _check_index(folder: Path, found: dict[str, TensorEntry]) -> None:
    if not (folder / INDEX).is_file():
        return
    weight_map = read_object(folder / INDEX, code=Code.INPUT_INDEX)["weight_map"]
    problems = [
        Problem(
            Code.INPUT_INDEX,
            f"the index says {weight_map[n]!s:.80}, the tensor is in {e.file.name}"
            if n in weight_map
            else f"the index does not name this tensor of {e.file.name}",
            where=n[:200],
            fix=_AGAIN,
        )
        for n, e in found.items()
        if weight_map.get(n) != e.file.name
    ]
    problems += [
        Problem(Code.INPUT_INDEX, f"not in {weight_map[n]!s:.80}", where=n[:200], fix=_AGAIN)
        for n in weight_map
        if n not in found
    ]
    raise_all(problems[:_MAX_OF_A_KIND])


def _matches(pattern: str, name: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\{i\}", r"\d+"), name) is not None


def _digest(entry: TensorEntry) -> str:
    import hashlib

    digest = hashlib.sha256(f"{entry.dtype}{entry.shape}".encode())
    with entry.file.open("rb") as f:
        f.seek(entry.start)
        left = entry.nbytes
        while left:
            chunk = f.read(min(left, 1 << 24))
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


def _torch_dtype(name: str) -> torch.dtype:
    import torch

    return {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64,
        "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
        "BOOL": torch.bool,
    }[name]  # fmt: skip


def _all_finite(tensor: torch.Tensor) -> bool:
    """NaN and Inf survive a sum in double precision, which needs no temporary of full size."""
    import torch

    flat = tensor.reshape(-1)
    return all(
        bool(torch.isfinite(part.sum(dtype=torch.float64)))
        if part.dtype.itemsize > 1
        else bool(torch.isfinite(part.float()).all())
        for part in flat.split(1 << 22)
    )
