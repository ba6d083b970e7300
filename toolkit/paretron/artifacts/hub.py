"""Finding a model: a local folder as it is, a hub id through the hub's own cache."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paretron.errors import Code, ParetronError, Problem

# What a checkpoint is made of; pickled weights and code are never fetched.
PATTERNS = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.json")
_CARD = "README.md"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Located:
    """Where a model lies, and the commit that a hub's revision stood for."""

    folder: Path
    commit: str | None = None


def locate(model: str, *, revision: str, offline: bool, weights: bool) -> Located:
    """The folder of a model: downloaded only when it is a hub id, and never with `offline`.

    With `weights` false the weights are left where they are. INPUT_MISSING when there is no such
    folder or hub id, INPUT_OFFLINE when it would have to be downloaded.
    """
    path = Path(model)
    if path.is_absolute() or path.is_dir():
        if not path.is_dir():
            raise ParetronError(
                Problem(
                    Code.INPUT_MISSING,
                    "no such folder",
                    where=model,
                    fix="name a folder with a Hugging Face checkpoint, or a hub id",
                )
            )
        return Located(path)
    if not _HUB_ID.fullmatch(model):
        raise ParetronError(
            Problem(
                Code.INPUT_MISSING,
                "neither a folder nor a hub id",
                where=model[:120],
                fix="a path, or ORGANISATION/NAME",
            )
        )
    return _from_hub(model, revision, offline=offline, weights=weights)


def _from_hub(model: str, revision: str, *, offline: bool, weights: bool) -> Located:
    from huggingface_hub import snapshot_download

    with _told(f"{model}@{revision}", offline=offline):
        folder = snapshot_download(
            model,
            revision=revision,
            allow_patterns=list(PATTERNS),
            ignore_patterns=None if weights else ["*.safetensors", "*.index.json"],
            local_files_only=offline,
        )
    return Located(Path(folder), commit=Path(folder).name)


@dataclass(frozen=True)
class DatasetContents:
    """The files of a dataset's commit by name, and the metadata that its card opens with."""

    commit: str
    names: tuple[str, ...]
    card: Mapping[str, Any]


def dataset_contents(dataset: str, *, revision: str, offline: bool) -> DatasetContents:
    """What a dataset holds at a revision; its card alone is downloaded, and never with `offline`.

    With `offline`, the files are those in the hub's cache. Errors: INPUT_OFFLINE, INPUT_MISSING,
    INPUT_FILE for a card that is no YAML.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.repocard import metadata_load

    where = f"{dataset}@{revision}"
    with _told(where, offline=offline):
        folder = Path(
            snapshot_download(
                dataset,
                repo_type="dataset",
                revision=revision,
                allow_patterns=[_CARD],
                local_files_only=offline,
            )
        )
        if offline:
            files = (path for path in folder.rglob("*") if path.is_file())
            names = [path.relative_to(folder).as_posix() for path in files]
        else:
            names = HfApi().list_repo_files(dataset, repo_type="dataset", revision=folder.name)
    try:
        card = metadata_load(folder / _CARD) if (folder / _CARD).is_file() else None
    except Exception as error:  # of the YAML library underneath, which is not ours to name
        cause = f"the card's metadata cannot be read: {' '.join(str(error).split())[:200]}"
        fix = "name another revision, or local files by path"
        raise ParetronError(Problem(Code.INPUT_FILE, cause, where=where, fix=fix)) from error
    return DatasetContents(folder.name, tuple(sorted(names)), card or {})


def dataset_file(dataset: str, name: str, *, commit: str, offline: bool) -> Path:
    """One file of a dataset in the hub's cache; downloaded if need be, never with `offline`.

    Errors: INPUT_OFFLINE, INPUT_MISSING.
    """
    from huggingface_hub import hf_hub_download

    with _told(f"{dataset}@{commit[:12]}: {name}", offline=offline):
        return Path(
            hf_hub_download(
                dataset, name, repo_type="dataset", revision=commit, local_files_only=offline
            )
        )


@contextmanager
def _told(where: str, *, offline: bool) -> Iterator[None]:
    """The hub's errors in our words: INPUT_OFFLINE, INPUT_MISSING."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        yield
    except LocalEntryNotFoundError as error:
        cause = "not in the local cache" if offline else "not in the local cache, hub unreachable"
        raise ParetronError(
            Problem(
                Code.INPUT_OFFLINE,
                cause,
                where=where,
                fix="run once without --offline where there is a network, or name a local folder",
            )
        ) from error
    except Exception as error:  # the library lets through whatever its transport raises
        raise ParetronError(
            Problem(
                Code.INPUT_MISSING,
                f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
                where=where,
                fix="check the id, its licence and your access (`hf auth login`)",
            )
        ) from error
