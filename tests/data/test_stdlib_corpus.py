from __future__ import annotations

from pathlib import Path

import pytest

from paretron.data.sources import content_sha256, read_documents
from paretron.data.stdlib_corpus import part_of, stdlib_files
from paretron.errors import Code, ParetronError
from paretron.recipe import TextSource

PARTS = ("pretrain", "train", "calibration", "validation")


def test_the_parts_share_no_file_and_are_large_enough_to_mean_something() -> None:
    files = {part: stdlib_files(part) for part in PARTS}
    everything = [path for part in PARTS for path in files[part]]
    assert len(everything) == len(set(everything))
    sizes = {part: sum(path.stat().st_size for path in files[part]) for part in PARTS}
    assert sizes["pretrain"] > 3_000_000
    assert sizes["train"] > 1_500_000
    assert min(sizes["calibration"], sizes["validation"]) > 250_000


def test_modules_teach_and_packages_test() -> None:
    assert all(len(p.relative_to(p.parents[0]).parts) == 1 for p in stdlib_files("pretrain"))
    packages = {path.parent.name for path in stdlib_files("train")}
    assert {"asyncio", "email", "json"} & packages
    for part in PARTS:
        for path in stdlib_files(part):
            assert not {"test", "tests", "site-packages", "encodings"} & set(path.parts[-4:-1])


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("argparse.py", "pretrain"),
        ("asyncio/tasks.py", "train"),
        ("asyncio/threads.py", "validation"),
        ("unittest/mock.py", "validation"),
    ],
)
def test_a_files_part_is_the_same_on_every_machine(name: str, part: str) -> None:
    assert part_of(name) == part


def test_what_a_machines_owner_added_does_not_count(tmp_path: Path) -> None:
    for name in (
        "good.py", "empty.py", "notes.txt", "sitecustomize.py", "_sysconfigdata__linux.py",
        "test/test_good.py", "config-3.11-x86_64-linux-gnu/python-config.py",
        "site-packages/other.py", "json/tests/test_json.py", "encodings/cp037.py",
    ):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("" if name == "empty.py" else "x = 1\n")
    (tmp_path / "linked.py").symlink_to(tmp_path / "good.py")
    assert stdlib_files("pretrain", root=tmp_path) == [tmp_path / "good.py"]


def test_an_interpreter_without_sources_is_told(tmp_path: Path) -> None:
    with pytest.raises(ParetronError) as caught:
        stdlib_files("train", root=tmp_path)
    assert caught.value.problems[0].code is Code.INPUT_CORPUS
    assert str(tmp_path) in caught.value.problems[0].where


def test_it_reads_as_any_source() -> None:
    source = TextSource(corpus="stdlib", part="validation")
    documents = list(read_documents(source))
    assert len(documents) == len(stdlib_files("validation"))
    assert documents == list(read_documents(source))
    assert content_sha256(source) == content_sha256(source)
    assert content_sha256(source) != content_sha256(TextSource(corpus="stdlib", part="calibration"))
