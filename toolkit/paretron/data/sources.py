"""Documents of a text source, one after the other in a fixed order, and the source's identity."""

from __future__ import annotations

import codecs
import glob
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from paretron.artifacts.guard import LFS_START, lfs_pointer
from paretron.data.datasets import find_dataset
from paretron.data.parquet import parquet_texts
from paretron.data.stdlib_corpus import stdlib_files
from paretron.errors import Code, ParetronError, Problem
from paretron.recipe import TextSource

TEXT_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".txt")
_FORM = '.jsonl with {"text": ...} on every line, .parquet with a column of strings, or .txt'


def read_documents(source: TextSource, *, offline: bool = True) -> Iterator[str]:
    """Every document of a source: a line of a .jsonl file, a row of a .parquet file, or a file.

    Files come sorted by path and are read, those of a dataset downloaded, as they are needed.
    Errors: INPUT_CORPUS for no or wrong files, bytes that are not UTF-8, bad JSON or parquet, and a
    missing or blank text; INPUT_LFS; INPUT_OFFLINE, INPUT_MISSING for a dataset.
    """
    if source.dataset is not None:
        for path in find_dataset(source, offline=offline).fetched(offline=offline):
            yield from _documents(path, source.column)
    elif source.corpus is not None:
        for path in source_files(source):
            # a library's own sources: one odd byte is no reason to stop
            yield path.read_text("utf-8", errors="replace")
    else:
        for path in source_files(source):
            yield from _documents(path, source.column)


def source_files(source: TextSource) -> list[Path]:
    """The files of a source that is here, sorted; INPUT_CORPUS for none or a wrong one."""
    if source.path is None:
        return stdlib_files(str(source.part))
    matched = {Path(name) for name in glob.glob(source.path, recursive=True)}
    files = sorted(path for path in matched if path.is_file())
    if not files:
        raise _error("no file matches", source.path)
    for path in files:
        if not path.name.endswith(TEXT_SUFFIXES):
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


def _documents(path: Path, column: str) -> Iterator[str]:
    with path.open("rb") as f:
        if f.read(len(LFS_START)) == LFS_START:
            raise lfs_pointer(path, instead_of="text")
    if path.suffix == ".txt":
        yield _not_blank(_decode(path.read_bytes(), str(path)), str(path))
        return
    empty = True
    lines = parquet_texts if path.suffix == ".parquet" else _line_texts
    for text in lines(path, column):
        yield text
        empty = False
    if empty:
        raise _error("the text is empty", str(path))


def _line_texts(path: Path, column: str) -> Iterator[str]:
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as f:
            for number, line in enumerate(f, start=1):
                if line.strip():  # not the empty line at the end of many files
                    yield _line_text(line, column, f"{path}:{number}")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _error(f"not a whole gzip file: {error}", f"{path}:{number + 1}") from error


def _line_text(line: bytes, column: str, where: str) -> str:
    try:
        value = json.loads(_decode(line, where))
    except (ValueError, RecursionError) as error:
        raise _error(f"not valid JSON: {str(error)[:200]}", where) from error
    if not isinstance(value, dict) or column not in value:
        raise _error(f'not an object with a "{column}"', where)
    text = value[column]
    if not isinstance(text, str):
        raise _error(f'"{column}" is of type {type(text).__name__}, not a string', where)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell what no tokenizer can read
        raise _error(f'"{column}" holds half a surrogate pair at {error.start}', where) from error
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
