"""Which files hold a checkpoint's weights, and what the index says of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paretron.artifacts.guard import inside
from paretron.artifacts.headers import TensorEntry, read_header
from paretron.artifacts.jsonfile import read_object
from paretron.errors import Code, ParetronError, Problem, raise_all

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_OF_A_KIND = 20  # problems told at once: a wrong file may cause thousands
_AGAIN = "restore the index and the shards from where the model came"
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_SHARD_NAME = re.compile(r"model-\d+-of-\d+\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class WeightFiles:
    """The files of the weights, the index's map (None for a single file), and what is ignored."""

    files: tuple[Path, ...]
    weight_map: dict[str, Any] | None
    ignored: tuple[str, ...]


def weight_files(folder: Path) -> WeightFiles:
    """The files that hold the weights, by index or alone; nothing outside of the folder.

    Errors: INPUT_INDEX, INPUT_UNSAFE_PATH, INPUT_FILE, INPUT_PICKLE, INPUT_MISSING.
    """
    index = inside(folder, INDEX)
    if index is not None:
        weight_map = read_object(index, code=Code.INPUT_INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise _bad_index("no weight_map", str(index))
        names = sorted({str(v) for v in weight_map.values()})
        files = tuple(_shard(folder, name) for name in names)
        present = _safetensors(folder)
        if stray := [n for n in present if _SHARD_NAME.fullmatch(n) and n not in names]:
            raise ParetronError(
                Problem(
                    Code.INPUT_INDEX,
                    "a shard that is not named by the index",
                    where=str(folder / stray[0]),
                    fix="remove it, or restore the index that belongs to it",
                )
            )
        return WeightFiles(files, weight_map, tuple(n for n in present if n not in names))
    single = inside(folder, SINGLE)
    if single is not None:
        present = _safetensors(folder)
        if stray := [n for n in present if _SHARD_NAME.fullmatch(n)]:
            raise ParetronError(
                Problem(
                    Code.INPUT_INDEX,
                    f"a shard without an index, beside {SINGLE}",
                    where=str(folder / stray[0]),
                    fix=f"remove the shards, or restore {INDEX}",
                )
            )
        return WeightFiles((single,), None, tuple(n for n in present if n != SINGLE))
    raise _no_weights(folder)


def _check_index(weights: WeightFiles, found: dict[str, TensorEntry]) -> None:
    """INPUT_INDEX unless the index names each tensor of the headers, where it is, and no other."""
    weight_map = weights.weight_map
    if weight_map is None:
        return
    problems: list[Problem] = []
    for name, entry in found.items():
        said = weight_map.get(name)
        if said == entry.file.name:
            continue
        cause = f"the index says {said!s:.80}, the tensor is in {entry.file.name}"
        if name not in weight_map:
            cause = f"the index does not name this tensor of {entry.file.name}"
        problems.append(Problem(Code.INPUT_INDEX, cause, where=name[:200], fix=_AGAIN))
    problems += [
        Problem(Code.INPUT_INDEX, f"not in {weight_map[n]!s:.80}", where=n[:200], fix=_AGAIN)
        for n in weight_map
        if n not in found
    ]
    raise_all(problems[:MAX_OF_A_KIND])


def entries_of(weights: WeightFiles) -> dict[str, TensorEntry]:
    """The tensors of all files by their headers, checked against the index."""
    found: dict[str, TensorEntry] = {}
    for file in weights.files:
        for name, entry in read_header(file).items():
            if name in found:
                raise _two_places(found[name], entry)
            found[name] = entry
    _check_index(weights, found)
    return found


def _two_places(first: TensorEntry, second: TensorEntry) -> ParetronError:
    """The error for a tensor that stands in two shards."""
    cause = f"the tensor stands in {first.file.name} and in {second.file.name}"
    return _bad_index(cause, first.name[:200])


def _shard(folder: Path, name: str) -> Path:
    """The shard of that name: a plain name, so that it cannot lead anywhere else."""
    if not _SAFE_NAME.fullmatch(name):
        raise ParetronError(
            Problem(
                Code.INPUT_UNSAFE_PATH,
                f"{name[:80]!r} is not a plain file name",
                where=str(folder / INDEX),
                fix="take the model from a source you trust: an index names shards beside itself",
            )
        )
    path = inside(folder, name)
    if path is None:
        raise ParetronError(
            Problem(
                Code.INPUT_INDEX,
                "the index names this shard, but it is not here",
                where=str(folder / name),
                fix="finish the download",
            )
        )
    return path


def _safetensors(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("*.safetensors"))


def _no_weights(folder: Path) -> ParetronError:
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
    if pickles:
        return ParetronError(
            Problem(
                Code.INPUT_PICKLE,
                "the weights are pickled, which can run code when opened",
                where=str(folder / pickles[0]),
                fix="convert them to safetensors where you trust them, then come back",
            )
        )
    return ParetronError(
        Problem(
            Code.INPUT_MISSING,
            "config.json is here, but no safetensors weights",
            where=str(folder),
            fix=f"add {SINGLE}, or shards with {INDEX}",
        )
    )


def _bad_index(cause: str, where: str) -> ParetronError:
    return ParetronError(Problem(Code.INPUT_INDEX, cause, where=where, fix=_AGAIN))
