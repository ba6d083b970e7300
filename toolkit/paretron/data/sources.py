"""Documents of a text source, one after the other in a fixed order, and the source's identity."""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from paretron.data.stdlib_corpus import stdlib_files
from paretron.errors import Code, ParetronError, Problem
from paretron.recipe import TextSource

TEXT_SUFFIXES = (".jsonl", ".txt")
_FORM = '.jsonl with {"text": ...} on every line, or .txt'


def read_documents(source: TextSource) -> Iterator[str]:
    """Every document of a source: a line of a .jsonl file, or the whole of any other file.

    Files come sorted by path and are read as they are needed. Errors: INPUT_CORPUS for no or
    wrong files, bytes that are not UTF-8, bad JSON, and a missing or blank text.
    """
    for path in source_files(source):
        if source.corpus is not None:
            # a library's own sources: one odd byte is no reason to stop
            yield path.read_text("utf-8", errors="replace")
        elif path.suffix == ".jsonl":
            yield from _read_lines(path)
        else:
            yield _not_blank(_decode(path.read_bytes(), str(path)), str(path))


def source_files(source: TextSource) -> list[Path]:
    """The files of a source, sorted; INPUT_CORPUS when none matches, or one of another kind."""
    if source.path is None:
        return stdlib_files(str(source.part))
    matched = {Path(name) for name in glob.glob(source.path, recursive=True)}
    files = sorted(path for path in matched if path.is_file())
    if not files:
        raise _error("no file matches", source.path)
    for path in files:
        if path.suffix not in TEXT_SUFFIXES:
            raise _error(f"not one of {', '.join(TEXT_SUFFIXES)}", str(path))
    return files


def content_sha256(source: TextSource) -> str:
    """A hash over the kind, size and bytes of a source's files in order, wherever they lie."""
    total = hashlib.sha256()
    for path in source_files(source):
        with path.open("rb") as f:
            content = hashlib.file_digest(f, "sha256").hexdigest()
        total.update(f"{path.suffix} {path.stat().st_size} {content}\n".encode())
    return total.hexdigest()


def _read_lines(path: Path) -> Iterator[str]:
    seen = 0
    with path.open("rb") as f:
        for number, line in enumerate(f, start=1):
            if not line.strip():
                continue  # the empty line at the end of many files
            seen += 1
            yield _line_text(line, f"{path}:{number}")
    if not seen:
        raise _error("the text is empty", str(path))


def _line_text(line: bytes, where: str) -> str:
    try:
        value = json.loads(_decode(line, where))
    except (ValueError, RecursionError) as error:
        raise _error(f"not valid JSON: {str(error)[:200]}", where) from error
    if not isinstance(value, dict) or "text" not in value:
        raise _error('not an object with a "text"', where)
    text = value["text"]
    if not isinstance(text, str):
        raise _error(f'"text" is of type {type(text).__name__}, not a string', where)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell what no tokenizer can read
        raise _error(f'"text" holds half a surrogate pair at {error.start}', where) from error
    return _not_blank(text, where)


def _decode(content: bytes, where: str) -> str:
    try:
        return content.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise _error(f"not UTF-8 at byte {error.start}", where) from error


def _not_blank(text: str, where: str) -> str:
    if not text or text.isspace():
        raise _error("the text is empty", where)
    return text


def _error(cause: str, where: str) -> ParetronError:
    return ParetronError(Problem(Code.INPUT_CORPUS, cause, where=where, fix=_FORM))
