"""An artifact is either absent or complete, whatever happens while it is written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from pathlib import Path

import pytest

from paretron.artifacts import staging
from paretron.artifacts.manifest import Provenance, verify
from paretron.artifacts.staging import locked, refuse_overlap, staged
from paretron.errors import Code, ParetronError

MADE = Provenance(kind="test", seed=0)


def publish(target: Path, text: str, *, overwrite: bool = False) -> None:
    with staged(target, provenance=MADE, overwrite=overwrite) as folder:
        (folder / "sub").mkdir()
        (folder / "sub/data.txt").write_text(text)
        (folder / "more.txt").write_text(text)


def content(target: Path) -> str:
    verify(target)
    return (target / "sub/data.txt").read_text()


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.endswith(".staging"))


def test_a_clean_exit_publishes_everything(tmp_path: Path) -> None:
    publish(tmp_path / "deep/er/out", "x")
    assert content(tmp_path / "deep/er/out") == "x"
    assert leftovers(tmp_path / "deep/er") == []


class _StopError(Exception):
    pass


@pytest.mark.parametrize("error", [_StopError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    with (
        pytest.raises(error),
        staged(tmp_path / "out", provenance=MADE) as folder,
    ):
        (folder / "half").write_text("")
        raise error
    assert not (tmp_path / "out").exists()
    assert leftovers(tmp_path) == []


def test_an_exception_leaves_the_old_one(tmp_path: Path) -> None:
    publish(tmp_path / "out", "old")
    with (
        pytest.raises(_StopError),
        staged(tmp_path / "out", provenance=MADE, overwrite=True) as folder,
    ):
        (folder / "half").write_text("")
        raise _StopError
    assert content(tmp_path / "out") == "old"


def test_an_existing_target_is_refused_before_any_work(tmp_path: Path) -> None:
    for name in ("folder", "file", "link"):
        target = tmp_path / name
        if name == "folder":
            target.mkdir()
        elif name == "file":
            target.write_text("mine")
        else:
            target.symlink_to(tmp_path / "nowhere")
        with (
            pytest.raises(ParetronError) as caught,
            staged(target, provenance=MADE),
        ):
            pytest.fail("the work began")
        assert caught.value.problems[0].code is Code.OUT_EXISTS
    assert (tmp_path / "file").read_text() == "mine"


def test_overwrite_exchanges(tmp_path: Path) -> None:
    publish(tmp_path / "out", "old")
    publish(tmp_path / "out", "new", overwrite=True)
    assert content(tmp_path / "out") == "new"
    publish(tmp_path / "fresh", "first", overwrite=True)
    assert content(tmp_path / "fresh") == "first"
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("kind", ["link", "dangling", "empty"])
def test_overwriting_what_holds_nothing_else_leaves_nothing_behind(
    kind: str, tmp_path: Path
) -> None:
    target, other = tmp_path / "out", tmp_path / "other"
    publish(other, "old")
    if kind == "empty":
        target.mkdir()
    else:
        target.symlink_to(other if kind == "link" else "nowhere")
    for text in ("new", "newer"):
        publish(target, text, overwrite=True)
        assert content(target) == text
        assert not target.is_symlink()
        assert leftovers(tmp_path) == []
    assert content(other) == "old"


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_somebody_else_wrote_is_not_overwritten(kind: str, tmp_path: Path) -> None:
    target, other = tmp_path / "out", tmp_path / "thesis"
    if kind == "file":
        target.write_text("mine")
    else:
        folder = target if kind == "folder" else other
        folder.mkdir()
        (folder / "thesis.txt").write_text("mine")
        if kind == "link":
            target.symlink_to(other)
    with pytest.raises(ParetronError, match="did not write") as caught:
        publish(target, "x", overwrite=True)
    assert caught.value.exit_code == 2
    assert (target if kind == "file" else target / "thesis.txt").read_text() == "mine"


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / ".out.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match=r"\.out\.lock") as caught:
        publish(tmp_path / "out", "x")
    assert caught.value.errno == errno.ELOOP
    assert (tmp_path / "victim").read_text() == "mine"


def test_a_file_where_the_folder_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError) as caught:
        publish(tmp_path / "file/out", "x")
    assert caught.value.filename == str(tmp_path / "file")


def test_overwriting_never_shows_neither(tmp_path: Path) -> None:
    """A reader that keeps looking sees a whole artifact every time."""
    target = tmp_path / "out"
    publish(target, "0")
    seen: set[str] = set()
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            seen.add((target / "sub/data.txt").read_text())

    reader = threading.Thread(target=look)
    reader.start()
    for i in range(1, 20):
        publish(target, str(i), overwrite=True)
    stop.set()
    reader.join()
    assert seen <= {str(i) for i in range(20)}
    assert len(seen) > 1


def test_published_while_we_waited_for_nothing(tmp_path: Path) -> None:
    """Two writers in a row, without --overwrite: the second one loses, not the first."""
    first = staged(tmp_path / "out", provenance=MADE)
    with first as folder:
        (folder / "a").write_text("first")
        with (
            pytest.raises(ParetronError) as caught,
            staged(tmp_path / "out", provenance=MADE),
        ):
            pytest.fail("two writers at once")
        assert caught.value.problems[0].code is Code.LOCKED
        assert str(os.getpid()) in caught.value.problems[0].cause
    assert (tmp_path / "out/a").read_text() == "first"


def test_what_is_known_not_to_fit_is_refused_before_any_work(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    with (
        pytest.raises(ParetronError) as caught,
        staged(tmp_path / "out", provenance=MADE, needed_bytes=4 * free),
    ):
        pytest.fail("the work began")
    (problem,) = caught.value.problems
    assert problem.code is Code.DISK
    assert f"{4 * free} bytes needed" in problem.cause
    assert "bytes free" in problem.cause
    assert leftovers(tmp_path) == []


def test_provenance_may_be_made_meanwhile(tmp_path: Path) -> None:
    asked_when: list[bool] = []

    def made() -> Provenance:
        asked_when.append((tmp_path / ".out.staging/data").is_file())
        return MADE

    with staged(tmp_path / "out", provenance=made) as folder:
        (folder / "data").write_text("x")
    assert asked_when == [True]
    assert verify(tmp_path / "out")["kind"] == "test"


def test_a_digest_that_is_known_is_not_computed_again(tmp_path: Path) -> None:
    digests = {"data": "0" * 64}
    with staged(tmp_path / "out", provenance=MADE, digests=digests) as folder:
        (folder / "data").write_text("x")
    with pytest.raises(ParetronError, match="data"):
        verify(tmp_path / "out")


def test_where_nothing_can_be_exchanged_the_old_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path / "out", "old")
    monkeypatch.setattr(staging, "_RENAME_EXCHANGE", 1 << 6)  # no flag: the kernel says EINVAL
    with pytest.raises(ParetronError) as caught:
        publish(tmp_path / "out", "new", overwrite=True)
    assert caught.value.problems[0].code is Code.OUT_EXISTS
    assert "without --overwrite" in caught.value.problems[0].fix
    assert content(tmp_path / "out") == "old"
    assert leftovers(tmp_path) == []


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(staging.fcntl, "flock", no_locks)
    with pytest.raises(ParetronError) as caught:
        publish(tmp_path / "out", "x")
    assert caught.value.problems[0].code is Code.LOCKED
    assert "cannot lock" in caught.value.problems[0].cause


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_a_resource_problem(number: int, tmp_path: Path) -> None:
    with (
        pytest.raises(ParetronError) as caught,
        staged(tmp_path / "out", provenance=MADE) as folder,
    ):
        (folder / "half").write_bytes(bytes(77))
        raise OSError(number, os.strerror(number))
    (problem,) = caught.value.problems
    assert problem.code is Code.DISK
    assert "after 77 bytes" in problem.cause
    assert "bytes free" in problem.cause
    assert not (tmp_path / "out").exists()
    assert leftovers(tmp_path) == []


def test_another_os_error_is_itself(tmp_path: Path) -> None:
    with (
        pytest.raises(FileNotFoundError),
        staged(tmp_path / "out", provenance=MADE) as folder,
    ):
        (folder / "nowhere/x").write_text("")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    "out", ["model", "model/inside", ".", "link", "link/inside", "model/../model"]
)
def test_an_output_that_overlaps_its_input(out: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    with pytest.raises(ParetronError) as caught:
        refuse_overlap(tmp_path / out, tmp_path / "model")
    assert caught.value.problems[0].code is Code.OUT_OVERLAP
    assert caught.value.exit_code == 2
    refuse_overlap(tmp_path / "models", tmp_path / "model")


def test_a_lock_names_what_it_guards(tmp_path: Path) -> None:
    with locked(tmp_path / "l", what="the run"):
        holder = json.loads((tmp_path / "l").read_text())
        assert holder["pid"] == os.getpid()
        with (
            pytest.raises(ParetronError) as caught,
            locked(tmp_path / "l", what="the run"),
        ):
            pass
    assert caught.value.problems[0].where == "the run"
    with locked(tmp_path / "l", what="the run"):
        pass
