from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from paretron.data.sources import content_sha256, read_documents
from paretron.errors import Code, ParetronError, Problem
from paretron.recipe import TextSource


def refusal(path: str | Path) -> Problem:
    with pytest.raises(ParetronError) as caught:
        list(read_documents(TextSource(path=str(path))))
    problem = caught.value.problems[0]
    assert problem.code is Code.INPUT_CORPUS
    assert problem.fix
    return problem


def test_lines_of_jsonl_and_whole_txt_files_in_sorted_order(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n{"text": "two\\n", "id": 7}\n')
    (tmp_path / "c.txt").write_bytes(b"three\r\nlines\n")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfz\xc3\xa9ro")
    documents = list(read_documents(TextSource(path=f"{tmp_path}/*")))
    assert documents == ["zéro", "one", "two\n", "three\r\nlines\n"]


def test_a_glob_goes_into_folders_and_sees_each_file_once(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    assert list(read_documents(TextSource(path=f"{tmp_path}/**/*.txt"))) == ["b", "a"]


def test_reading_is_lazy(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\nbroken\n')
    documents = read_documents(TextSource(path=f"{tmp_path}/a.jsonl"))
    assert next(documents) == "one"
    with pytest.raises(ParetronError):
        next(documents)


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        (b"not json", "not valid JSON"),
        (b"[1, 2]", 'not an object with a "text"'),
        (b'{"content": "x"}', 'not an object with a "text"'),
        (b'{"text": 3}', "of type int"),
        (b'{"text": null}', "of type NoneType"),
        (b'{"text": ""}', "the text is empty"),
        (b'{"text": " \\n\\t"}', "the text is empty"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b'{"text": "\xff"}', "not UTF-8 at byte 10"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, cause: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    problem = refusal(path)
    assert cause in problem.cause
    assert problem.where == f"{path}:2"


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("a.txt", b"", "the text is empty"),
        ("a.txt", b" \n ", "the text is empty"),
        ("a.txt", b"\xfe\xff", "not UTF-8"),
        ("a.jsonl", b"", "the text is empty"),
        ("a.jsonl", b"\n\n", "the text is empty"),
        ("a.parquet", b"PAR1", "not a whole parquet file"),
        ("a.jsonl.gz", b"\x1f\x8b", "not a whole gzip file"),
        ("a.csv", b"text\nx\n", "not one of .jsonl, .jsonl.gz, .parquet, .txt"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: bytes, cause: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    problem = refusal(path)
    assert cause in problem.cause
    assert problem.where.startswith(str(path))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_pointer_in_the_place_of_a_text_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ParetronError) as caught:
        list(read_documents(TextSource(path=str(path))))
    assert caught.value.problems[0].code is Code.INPUT_LFS
    assert caught.value.problems[0].where == str(path)


def test_another_key_holds_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "no", "content": "one"}\n{"text": "no"}\n')
    documents = read_documents(TextSource(path=str(path), column="content"))
    assert next(documents) == "one"
    with pytest.raises(ParetronError, match='not an object with a "content"') as caught:
        next(documents)
    assert caught.value.problems[0].where == f"{path}:2"


def test_compressed_lines_are_lines(tmp_path: Path) -> None:
    content = gzip.compress(b'{"text": "one"}\n{"text": "two"}\n' * 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    source = TextSource(path=f"{tmp_path}/*.gz")
    assert list(read_documents(source)) == ["one", "two"] * 1000
    (tmp_path / "a.jsonl.gz").write_bytes(content[: len(content) // 2])
    assert "not a whole gzip file" in refusal(f"{tmp_path}/*.gz").cause


def test_no_file_at_all_is_an_error(tmp_path: Path) -> None:
    pattern = f"{tmp_path}/*.jsonl"
    assert refusal(pattern).where == pattern
    assert "no file" in refusal(tmp_path).cause  # a folder is no file


def test_the_identity_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    def identity(folder: str, *texts: str) -> str:
        (tmp_path / folder).mkdir()
        for number, text in enumerate(texts):
            line = json.dumps({"text": text}) + "\n"
            (tmp_path / folder / f"{number}.jsonl").write_text(line)
        return content_sha256(TextSource(path=f"{tmp_path}/{folder}/*"))

    assert identity("a", "one", "two") == identity("b", "one", "two")
    assert (
        len({identity("c", "one"), identity("d", "one", "two"), identity("e", "two", "one")}) == 3
    )
