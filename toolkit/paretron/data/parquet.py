"""Texts of a .parquet file: one column of strings, read as it is needed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paretron.errors import Code, ParetronError, Problem

_ROWS = 1024  # decoded at once


def parquet_texts(path: Path, column: str) -> Iterator[str]:
    """The strings of a column, row by row; blank ones, which tables hold, are passed over.

    Memory is bounded by one page of the file. Errors: INPUT_CORPUS for a broken file, an absent
    column or one of another type, a null and bytes that are not UTF-8; OPTIONAL_MISSING.
    """
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise ParetronError(
            Problem(
                Code.OPTIONAL_MISSING,
                "pyarrow is not installed",
                where=str(path),
                fix="pip install 'paretron[data]'",
            )
        ) from error
    try:
        with parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            _check_column(pa, file.schema_arrow, column, path)
            first = 1
            for batch in file.iter_batches(_ROWS, columns=[column], use_threads=False):
                for number, value in enumerate(batch.column(0), start=first):
                    text = _text(value, f"{path}: row {number}", column)
                    if text.strip():
                        yield text
                first += len(batch)
    except (pa.ArrowException, OSError) as error:
        cause = f"not a whole parquet file: {' '.join(str(error).split())[:200]}"
        raise _error(cause, str(path), "write or download the file again") from error


def _check_column(pa: Any, schema: Any, column: str, path: Path) -> None:
    if (index := schema.get_field_index(column)) < 0:
        names = ", ".join(schema.names)[:200]
        raise _error(f"no column {column!r}", str(path), f"column: one of {names}")
    kind = schema.field(index).type
    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    if not any(check(values) for check in checks):
        cause = f"the column {column!r} holds {str(kind)[:80]}, not strings"
        raise _error(cause, str(path), "name a column of strings")


def _text(value: Any, where: str, column: str) -> str:
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        raise _error(f"not UTF-8 at byte {error.start}", where, "mend the row") from error
    if text is None:
        raise _error(f"{column!r} is null", where, "drop the rows without a text")
    return str(text)


def _error(cause: str, where: str, fix: str) -> ParetronError:
    return ParetronError(Problem(Code.INPUT_CORPUS, cause, where=where, fix=fix))
