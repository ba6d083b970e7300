"""Which files of a hub's dataset hold the texts asked for: by its card, else by their names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from paretron.artifacts.hub import dataset_contents, dataset_file
from paretron.errors import Code, ParetronError, Problem
from paretron.recipe import TextSource

READABLE = (".parquet", ".jsonl", ".jsonl.gz")
MAIN, TRAIN = "main", "train"
_SPLITS = ("train", "validation", "valid", "val", "dev", "test", "eval")
_NUMBERED = re.compile(r"(.*-)(\d{5})-of-(\d{5})(\.[a-z.]+)")


@dataclass(frozen=True)
class FoundDataset:
    """A dataset's commit and, in the order of reading, the files of a split."""

    dataset: str
    commit: str
    names: tuple[str, ...]

    def fetched(self, *, offline: bool) -> Iterator[Path]:
        """The files, each downloaded when it is reached unless it is in the hub's cache.

        Errors: INPUT_OFFLINE, INPUT_MISSING.
        """
        for name in self.names:
            yield dataset_file(self.dataset, name, commit=self.commit, offline=offline)


def find_dataset(source: TextSource, *, offline: bool) -> FoundDataset:
    """The files of a source's dataset, config and split, and the commit of its revision.

    Only names and the card are read. With `offline` the hub's cache is looked at alone; files whose
    names say that there are more of them are counted in. Errors: INPUT_OFFLINE, INPUT_MISSING,
    INPUT_CORPUS when the dataset has no such config or split, or no file that can be read.
    """
    assert source.dataset is not None
    found = dataset_contents(source.dataset, revision=source.revision or MAIN, offline=offline)
    where = f"{source.dataset}@{found.commit[:12]}"
    names = _completed(found.names) if offline else found.names
    split = source.split or TRAIN
    chosen = _by_card(names, found.card, source.config, split, where)
    if chosen is None:
        chosen = _by_name(names, source.config, split, where)
    if offline and not chosen:
        cause, fix = f"no file of split {split!r} is in the local cache", "run without --offline"
        raise ParetronError(Problem(Code.INPUT_OFFLINE, cause, where=where, fix=fix))
    unreadable = [name for name in chosen if not name.endswith((*READABLE, ".txt"))]
    if unreadable or not chosen:
        cause = f"{unreadable[0]} cannot be read" if unreadable else f"no file of split {split!r}"
        raise _refused(
            cause,
            where,
            f"another config or split with files of {', '.join(READABLE)}; revision: "
            "refs/convert/parquet has most datasets in that form",
        )
    return FoundDataset(source.dataset, found.commit, tuple(sorted(chosen)))


def _by_card(
    names: Sequence[str], card: Mapping[str, Any], config: str | None, split: str, where: str
) -> list[str] | None:
    """The files that the card lists for a split; None where it says nothing of files."""
    listed = card.get("configs")
    configs = [c for c in listed if isinstance(c, dict)] if isinstance(listed, list) else []
    by_name = {str(c.get("config_name", "default")): c for c in configs if "data_files" in c}
    if not by_name:
        return None
    if config is None:
        defaults = [n for n, c in by_name.items() if n == "default" or c.get("default") is True]
        config = defaults[0] if defaults else next(iter(by_name))
        if not defaults and len(by_name) > 1:
            raise _choose("config", "several configs", by_name, where)
    if config not in by_name:
        raise _choose("config", f"no config {config!r}", by_name, where)
    patterns = _patterns(by_name[config]["data_files"])
    if split not in patterns:
        raise _choose("split", f"no split {split!r} in config {config!r}", patterns, where)
    return [name for name in names if any(_matches(name, p) for p in patterns[split])]


def _patterns(data_files: object) -> dict[str, list[str]]:
    """Split -> patterns: of a card's list of both, or of patterns alone, which are for training."""
    found: dict[str, list[str]] = {}
    for entry in data_files if isinstance(data_files, list) else [data_files]:
        split, paths = TRAIN, entry
        if isinstance(entry, dict):
            split, paths = str(entry.get("split", TRAIN)), entry.get("path", [])
        every = paths if isinstance(paths, list) else [paths]
        found.setdefault(split, []).extend(str(path) for path in every)
    return found


def _matches(name: str, pattern: str) -> bool:
    """`*` stays inside of a folder, `**/` stands for any number of them, none included."""
    if "**" not in pattern and name.count("/") != pattern.count("/"):
        return False
    return fnmatchcase(name, pattern) or fnmatchcase(name, pattern.replace("**/", ""))


def _by_name(names: Sequence[str], config: str | None, split: str, where: str) -> list[str]:
    """Files in the config's folder whose path has the split as a word; all, where none has any."""
    data = [name for name in names if name.endswith(READABLE)]
    if not data:
        return []
    folders: dict[str, list[str]] = {}
    for name in data:
        folders.setdefault(_config_of(name), []).append(name)
    if config is not None and config not in folders:
        raise _choose("config", f"no config {config!r}", folders, where)
    if config is None and len(folders) > 1:
        raise _choose("config", "several folders of data", folders, where)
    of_config = data if config is None else folders[config]
    split_of = {name: _words(name) & set(_SPLITS) for name in of_config}
    if split == TRAIN and not any(split_of.values()):
        return of_config
    if not any(split in found for found in split_of.values()):
        splits = sorted(set().union(*split_of.values()))
        raise _choose("split", f"no split {split!r}", splits, where)
    return [name for name, found in split_of.items() if split in found]


def _config_of(name: str) -> str:
    """The folders of a file, but for one that only names a split or says that data is data."""
    folders = PurePosixPath(name).parts[:-1]
    return "/".join(f for f in folders if f != "data" and f not in _SPLITS) or "default"


def _words(name: str) -> set[str]:
    return set(re.split(r"[/_.-]", name))


def _completed(names: Sequence[str]) -> tuple[str, ...]:
    """Names and those missing among numbered ones: the cache may hold a part of `x-00000-of-9`."""
    found = set(names)
    for name in names:
        if numbered := _NUMBERED.fullmatch(name):
            start, _, count, suffix = numbered.groups()
            found |= {f"{start}{k:05d}-of-{count}{suffix}" for k in range(int(count))}
    return tuple(sorted(found))


def _choose(
    key: str, cause: str, known: Sequence[str] | Mapping[str, Any], where: str
) -> ParetronError:
    return _refused(cause, where, f"{key}: one of {', '.join(sorted(known))[:300]}")


def _refused(cause: str, where: str, fix: str) -> ParetronError:
    return ParetronError(Problem(Code.INPUT_CORPUS, cause, where=where, fix=fix))
