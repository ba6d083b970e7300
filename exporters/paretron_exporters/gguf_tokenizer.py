"""A byte-level BPE from tokenizer.json in the form that a GGUF file holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paretron.artifacts.jsonfile import read_object
from paretron.errors import Code, ParetronError, Problem

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's kinds of token

# A piece of the splitting pattern that only one tokenizer has -> llama.cpp's name for it.
_PRE = (
    ("\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*", "llama-bpe"),
    ("|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*", "qwen2"),
    ("[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}", "tekken"),
)


@dataclass(frozen=True)
class GgufTokenizer:
    """Tokens by id with their kinds, merges in order, special tokens by role."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pre: str
    special: Mapping[str, int]
    adds_bos: bool | None
    chat_template: str | None


def read_tokenizer(folder: Path, *, vocab: int) -> GgufTokenizer:
    """Read the tokenizer files of a checkpoint; INPUT_TOKENIZER when it is no byte-level BPE.

    Rows of the embedding that no token uses get a name of their own, so there are `vocab` tokens.
    """
    path = folder / "tokenizer.json"
    raw = read_object(path, code=Code.INPUT_TOKENIZER)
    model = raw.get("model")
    splitter = json.dumps(raw.get("pre_tokenizer"), ensure_ascii=False)
    if not isinstance(model, dict) or model.get("type") != "BPE" or "ByteLevel" not in splitter:
        raise ParetronError(
            Problem(
                Code.INPUT_TOKENIZER,
                "only byte-level BPE tokenizers are written to GGUF",
                where=str(path),
                fix="convert the hf export with llama.cpp's convert_hf_to_gguf.py",
            )
        )
    tokens = [f"[PAD{i}]" for i in range(vocab)]
    types = [UNUSED] * vocab
    for token, i in model["vocab"].items():
        tokens[i], types[i] = token, NORMAL
    for added in raw.get("added_tokens", []):
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    settings = _optional(folder / "tokenizer_config.json")
    return GgufTokenizer(
        tokens=tokens,
        types=types,
        merges=merges,
        pre=_pre(raw["pre_tokenizer"], splitter),
        special=_special(folder, settings, tokens),
        adds_bos=settings.get("add_bos_token"),
        chat_template=_chat_template(folder, settings),
    )


def _pre(pre_tokenizer: Mapping[str, Any], text: str) -> str:
    patterns = json.loads(text)
    found = json.dumps(patterns, ensure_ascii=False).encode().decode("unicode_escape", "ignore")
    for piece, name in _PRE:
        if piece in found:
            return name
    # ByteLevel alone splits by GPT-2's own pattern, unless told not to.
    alone = pre_tokenizer.get("type") == "ByteLevel" and pre_tokenizer.get("use_regex", True)
    return "gpt-2" if alone and not pre_tokenizer.get("add_prefix_space") else "default"


def _special(folder: Path, settings: Mapping[str, Any], tokens: list[str]) -> dict[str, int]:
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    number = {token: i for i, token in enumerate(tokens)}
    found = {}
    config = _optional(folder / "config.json")
    for role, name in names.items():
        token = settings.get(f"{role}_token")
        content = token.get("content") if isinstance(token, dict) else token
        stated = config.get(f"{role}_token_id")
        if content in number:
            found[name] = number[content]
        elif type(stated) is int:
            found[name] = stated
    return found


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text()
    template = settings.get("chat_template")
    return template if isinstance(template, str) else None


def _optional(path: Path) -> dict[str, Any]:
    return read_object(path, code=Code.INPUT_TOKENIZER) if path.is_file() else {}
