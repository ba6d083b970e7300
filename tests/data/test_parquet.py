from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from paretron.data.parquet import parquet_texts
from paretron.data.sources import content_sha256, read_documents
from paretron.errors import Code, ParetronError, Problem
from paretron.recipe import TextSource


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    parquet.write_table(pa.table(columns), path, **options)
    return path


def refusal(path: Path, column: str = "text") -> Problem:
    with pytest.raises(ParetronError) as caught:
        list(read_documents(TextSource(path=str(path), column=column)))
    problem = caught.value.problems[0]
    assert problem.code is Code.INPUT_CORPUS
    assert problem.fix
    return problem


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
)
def test_the_rows_of_a_column_over_row_groups_are_documents(tmp_path: Path, kind: Any) -> None:
    texts = [f"zoë {k % 700}" for k in range(3000)]
    texts[5] = texts[2999] = " \n"
    column = pa.array(texts).cast(kind)
    path = write(tmp_path / "a.parquet", {"id": range(3000), "body": column}, row_group_size=1100)
    source = TextSource(path=str(path), column="body")
    assert list(read_documents(source)) == [text for text in texts if text.strip()]


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"text": ["x" * 50] * 5000}, row_group_size=1000)
    content = bytearray(path.read_bytes())
    second = parquet.ParquetFile(path).metadata.row_group(2).column(0)
    start = second.dictionary_page_offset or second.data_page_offset
    content[start : start + 40] = b"\xff" * 40  # a broken page in the third row group
    path.write_bytes(content)
    documents = parquet_texts(path, "text")
    assert next(documents) == "x" * 50
    with pytest.raises(ParetronError, match="not a whole parquet file"):
        list(documents)


def test_the_identity_is_that_of_the_bytes(tmp_path: Path) -> None:
    a, b = (write(tmp_path / f"{n}.parquet", {"text": [n]}) for n in "ab")
    known = content_sha256(TextSource(path=str(a)))
    assert known != content_sha256(TextSource(path=str(b)))
    assert known == content_sha256(TextSource(path=str(a.rename(tmp_path / "c.parquet"))))


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + bytes(64) + b"PAR1", b"{}" * 50])
def test_a_file_that_is_none_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    problem = refusal(path)
    assert "not a whole parquet file" in problem.cause
    assert problem.where == str(path)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"text": ["one", "two"]})
    path.write_bytes(path.read_bytes()[:-7])
    assert refusal(path).where == str(path)


def test_an_absent_column_is_named_with_those_there_are(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"content": ["x"], "id": [1]})
    problem = refusal(path)
    assert (problem.cause, problem.where) == ("no column 'text'", str(path))
    assert "content, id" in problem.fix


@pytest.mark.parametrize("values", [[1, 2], [["x"], ["y"]], [{"a": "x"}, {"a": "y"}], [b"x", b"y"]])
def test_a_column_of_another_type_is_named(tmp_path: Path, values: list[Any]) -> None:
    path = write(tmp_path / "a.parquet", {"text": values})
    problem = refusal(path)
    assert "not strings" in problem.cause
    assert "'text'" in problem.cause


def test_a_null_is_named_by_its_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"text": [*["x"] * 1500, None, "y"]}, row_group_size=400)
    problem = refusal(path)
    assert problem.where == f"{path}: row 1501"
    assert "null" in problem.cause


def test_bytes_that_are_no_text_are_named_by_their_row(tmp_path: Path) -> None:
    rows = pa.array([b"fine", b"\xff\xfe"]).cast(pa.binary()).view(pa.string())
    problem = refusal(write(tmp_path / "a.parquet", {"text": rows}))
    assert "not UTF-8" in problem.cause
    assert problem.where.endswith("row 2")


@pytest.mark.parametrize("texts", [[], ["", " "]])
def test_a_table_without_a_text_is_an_error(tmp_path: Path, texts: list[str]) -> None:
    path = write(tmp_path / "a.parquet", {"text": pa.array(texts, pa.string())})
    assert "empty" in refusal(path).cause
