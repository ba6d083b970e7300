"""A model's tokenizer files, looked at without the tokenizer: do its numbers fit the embedding?"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paretron.artifacts.allowed import check_token_ids, code_keys, left_out
from paretron.artifacts.guard import inside
from paretron.artifacts.jsonfile import read_object
from paretron.errors import Code, ParetronError, Problem, raise_all

TOKENIZER = "tokenizer.json"
# Files beside the weights that may name code, and their keys with an underscore that may stay.
MAY_NAME_CODE: Mapping[str, tuple[str, ...]] = {
    "tokenizer_config.json": (),
    "generation_config.json": ("_from_model_config",),
}
_MAX_BYTES, _MAX_NODES = 100_000_000, 2_000_000  # the largest published are a third of that
_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True)
class _Token:
    text: str
    number: int
    special: bool


def named_code(folder: Path) -> dict[str, set[str]]:
    """The files of a model that have keys which name code, with those keys."""
    found = {}
    for name, known in MAY_NAME_CODE.items():
        content = _read(folder, name)
        if content is not None and (keys := code_keys(content, known=known)):
            found[name] = keys
    return found


def cleaned(folder: Path, name: str) -> dict[str, Any]:
    """A file's content without the keys that name code, in its own order."""
    content = _read(folder, name) or {}
    keys = code_keys(content, known=MAY_NAME_CODE[name])
    return {k: v for k, v in content.items() if k not in keys}


def code_notices(folder: Path) -> tuple[str, ...]:
    """One sentence for every file of which keys are left out."""
    return tuple(n for name, keys in named_code(folder).items() for n in left_out(name, keys))


def embedding_rows(folder: Path) -> int:
    """The vocabulary of the model beside a tokenizer; beyond any number where none is told."""
    path = inside(folder, "config.json")
    rows = read_object(path, code=Code.INPUT_CONFIG).get("vocab_size") if path else None
    return rows if type(rows) is int else sys.maxsize


def tokenizer_problems(folder: Path, *, vocab: int) -> list[Problem]:
    """What keeps a tokenizer from being used with an embedding of `vocab` rows.

    A special token beyond it that has no role is no problem: some text models keep the tokenizer
    of a larger one, with tokens for images that text never becomes.
    """
    try:
        return list(_problems(folder, vocab))
    except ParetronError as error:
        return list(error.problems)


def check_tokenizer(folder: Path, *, vocab: int) -> None:
    """INPUT_TOKENIZER when a tokenizer is there and does not fit an embedding of `vocab` rows."""
    if inside(folder, TOKENIZER) is not None:
        raise_all(tokenizer_problems(folder, vocab=vocab))


def rows_with_tokens(folder: Path) -> int:
    """The largest number of a token, and one more: rows beyond pad an embedding."""
    path = folder / TOKENIZER
    content = read_object(
        path, code=Code.INPUT_TOKENIZER, max_bytes=_MAX_BYTES, max_nodes=_MAX_NODES
    )
    settings = _read(folder, "tokenizer_config.json") or {}
    tokens = (*_tokens(content, path), *_declared(settings, folder))
    return max((t.number for t in tokens), default=-1) + 1


def _problems(folder: Path, vocab: int) -> Iterator[Problem]:
    path = inside(folder, TOKENIZER)
    if path is None:
        cause, fix = f"no {TOKENIZER} here", "copy the tokenizer files beside the weights"
        yield Problem(Code.INPUT_TOKENIZER, cause, where=str(folder), fix=fix)
        return
    content = read_object(
        path, code=Code.INPUT_TOKENIZER, max_bytes=_MAX_BYTES, max_nodes=_MAX_NODES
    )
    settings = _read(folder, "tokenizer_config.json") or {}
    roles = {_text(settings.get(role)) for role in _ROLES}
    tokens = [*_tokens(content, path), *_declared(settings, folder)]
    beyond = [t for t in tokens if t.number >= vocab and (t.text in roles or not t.special)]
    if beyond:
        most = max(beyond, key=lambda t: t.number)
        yield Problem(
            Code.INPUT_TOKENIZER,
            f"token {most.text[:40]!r} has number {most.number}, but the embedding has {vocab} "
            f"rows ({len(beyond)} such tokens)",
            where=str(path),
            fix="use the tokenizer that the model was trained with",
        )
    generation = _read(folder, "generation_config.json") or {}
    check_token_ids(
        generation, vocab=vocab, file=str(folder / "generation_config.json"), code=Code.INPUT_CONFIG
    )


def _tokens(content: Mapping[str, Any], path: Path) -> Iterator[_Token]:
    """Every token of tokenizer.json; INPUT_TOKENIZER when it is not of a kind that we know."""
    match content.get("model"):
        case {"vocab": dict(numbers)}:
            pairs = list(numbers.items())
        case {"vocab": list(entries)}:  # a unigram model: [text, score], numbered as they stand
            pairs = [(str(e[0]) if isinstance(e, list) and e else "", n)
                     for n, e in enumerate(entries)]  # fmt: skip
        case _:
            raise _malformed(path, "no model with a vocabulary")
    for text, number in pairs:
        if type(number) is not int or number < 0:
            raise _malformed(path, f"token {text[:40]!r} has number {str(number)[:40]}")
        yield _Token(text, number, special=False)
    added = content.get("added_tokens") or []
    if not isinstance(added, list):
        raise _malformed(path, "added_tokens is no list")
    for token in added:
        match token:
            case {"id": int(number), "content": str(text)} if number >= 0:
                yield _Token(text, number, special=token.get("special") is True)
            case _:
                raise _malformed(path, f"added token {str(token)[:60]}")


def _declared(settings: Mapping[str, Any], folder: Path) -> Iterator[_Token]:
    """The tokens that tokenizer_config.json adds: number as text -> {content, special}."""
    declared = settings.get("added_tokens_decoder") or {}
    path = folder / "tokenizer_config.json"
    if not isinstance(declared, dict):
        raise _malformed(path, "added_tokens_decoder is no object")
    for number, token in declared.items():
        if not (number.isascii() and number.isdigit() and isinstance(token, dict)):
            raise _malformed(path, f"added token {number[:40]!r}")
        yield _Token(_text(token), int(number[:20]), special=token.get("special") is True)


def _text(token: object) -> str:
    """A token's text: itself, or the content of an object that describes it."""
    return str(token.get("content", "") if isinstance(token, dict) else token)


def _read(folder: Path, name: str) -> dict[str, Any] | None:
    path = inside(folder, name)
    return None if path is None else read_object(path, code=Code.INPUT_TOKENIZER)


def _malformed(path: Path, cause: str) -> ParetronError:
    fix = "restore the tokenizer's files from where the model came"
    return ParetronError(Problem(Code.INPUT_TOKENIZER, cause, where=str(path), fix=fix))
