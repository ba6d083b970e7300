"""Finding a model: a local folder as it is, a hub id through the hub's own cache."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from paretron.errors import Code, ParetronError, Problem

# What a checkpoint is made of; pickled weights and code are never fetched.
PATTERNS = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.json")
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
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            model,
            revision=revision,
            allow_patterns=list(PATTERNS),
            ignore_patterns=None if weights else ["*.safetensors", "*.index.json"],
            local_files_only=offline,
        )
    except LocalEntryNotFoundError as error:
        cause = "not in the local cache" if offline else "not in the local cache, hub unreachable"
        raise ParetronError(
            Problem(
                Code.INPUT_OFFLINE,
                cause,
                where=f"{model}@{revision}",
                fix="run once without --offline where there is a network, or name a local folder",
            )
        ) from error
    except Exception as error:  # the library lets through whatever its transport raises
        raise ParetronError(
            Problem(
                Code.INPUT_MISSING,
                f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
                where=f"{model}@{revision}",
                fix="check the id, its licence and your access (`hf auth login`)",
            )
        ) from error
    return Located(Path(folder), commit=Path(folder).name)
