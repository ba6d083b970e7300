"""What stands beside the weights in a Hugging Face repository: config, tokenizer, generation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paretron.artifacts.guard import LFS_START, inside, lfs_pointer
from paretron.artifacts.jsonfile import dump
from paretron.artifacts.tokenizer import cleaned, named_code

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def write_companions(folder: Path, *, config: Mapping[str, Any], source: Path) -> None:
    """Everything of a repository but weights and card: config, tokenizer, generation config."""
    dump(folder / "config.json", dict(config))
    copy_tokenizer(source, folder)
    if not copy_companion(source, folder, "generation_config.json"):
        ids = {
            k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if k in config
        }
        dump(folder / "generation_config.json", {"_from_model_config": True} | ids)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy what there is of a tokenizer."""
    for name in TOKENIZER_FILES:
        copy_companion(source, folder, name)


def copy_companion(source: Path, folder: Path, name: str) -> bool:
    """Copy one file byte for byte, or without its keys that name code; False when it is not there.

    INPUT_UNSAFE_PATH when it is a link out of its folder: what it links to is not the model's.
    INPUT_LFS when it is a git-lfs pointer.
    """
    path = inside(source, name)
    if path is None:
        return False
    with path.open("rb") as f:
        if f.read(len(LFS_START)) == LFS_START:
            raise lfs_pointer(path, instead_of="the file itself")
    if name in named_code(source):
        text = json.dumps(cleaned(source, name), indent=2) + "\n"
        (folder / name).write_text(text, "utf-8")
    else:
        shutil.copyfile(path, folder / name)
    return True
