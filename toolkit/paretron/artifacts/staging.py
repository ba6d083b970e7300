"""An artifact is either absent or complete: staged beside its target, published by one rename."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from paretron.artifacts.manifest import Provenance, write_manifest
from paretron.errors import Code, ParetronError, Problem

_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100
_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def staged(target: Path, *, provenance: Provenance, overwrite: bool = False) -> Iterator[Path]:
    """Yield a fresh folder beside `target`; on a clean exit it becomes `target`, whole.

    Errors: OUT_EXISTS when the target is there and `overwrite` is not asked for, LOCKED when
    another process is writing the same target, DISK when the volume is full. With any error the
    staging folder is removed and what was at `target` before stays untouched.
    """
    target = Path(os.path.abspath(target))
    refuse_existing(target, overwrite=overwrite)
    staging = target.parent / f".{target.name}.staging"
    lock = target.parent / f".{target.name}.lock"
    with _full_disk_told(target, staging), locked(lock, what=str(target)):
        refuse_existing(target, overwrite=overwrite)  # another process may have published it
        shutil.rmtree(staging, ignore_errors=True)  # a killed process left it
        try:
            with _full_disk_told(target, staging):
                staging.mkdir()
                yield staging
                write_manifest(staging, provenance)
                _fsync_tree(staging)
                _publish(staging, target, overwrite=overwrite)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def refuse_existing(target: Path, *, overwrite: bool) -> None:
    """OUT_EXISTS when something is at `target` that nobody said to replace."""
    if not overwrite and os.path.lexists(target):
        raise ParetronError(
            Problem(
                Code.OUT_EXISTS,
                "already exists",
                where=str(target),
                fix="name another --out, or add --overwrite",
            )
        )


def refuse_overlap(out: Path, source: Path) -> None:
    """OUT_OVERLAP when writing `out` could touch `source`, links resolved."""
    a, b = Path(os.path.realpath(out)), Path(os.path.realpath(source))
    if a == b or a.is_relative_to(b) or b.is_relative_to(a):
        raise ParetronError(
            Problem(
                Code.OUT_OVERLAP,
                f"overlaps with the input {source}",
                where=str(out),
                fix="name an --out outside of every input",
            )
        )


@contextmanager
def locked(path: Path, *, what: str) -> Iterator[None]:
    """Hold an exclusive lock file, or fail at once with LOCKED naming its holder.

    The kernel frees the lock when its holder dies, so a killed process never blocks the next. The
    file is removed with the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock_file(path, what) as f:
        f.seek(0)
        f.truncate()
        f.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        f.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _lock_file(path: Path, what: str) -> TextIO:
    """The opened and locked file at `path`; again when its last holder has just removed it."""
    while True:
        f = path.open("a+")
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            with f:
                raise ParetronError(
                    Problem(
                        Code.LOCKED,
                        f"another process is writing it: {_holder(f)}",
                        where=what,
                        fix="wait for it, or stop it",
                    )
                ) from error
        try:
            if os.fstat(f.fileno()).st_ino == path.stat().st_ino:
                return f
        except FileNotFoundError:
            pass
        f.close()


def _holder(f: TextIO) -> str:
    """Who says to hold the lock; it may have taken it only just now and still be writing that."""
    for _ in range(20):
        time.sleep(0.05)
        f.seek(0)
        if text := f.read(200):
            return text
    return "unknown"


def _publish(staging: Path, target: Path, *, overwrite: bool) -> None:
    if overwrite and os.path.lexists(target):
        _exchange(staging, target)  # the old one is now at `staging` and removed by the caller
    else:
        os.rename(staging, target)
    _fsync_folder(target.parent)


def _exchange(a: Path, b: Path) -> None:
    """Swap two paths in one step, so that a reader sees the old or the new, never neither."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, bytes(a), _AT_FDCWD, bytes(b), _RENAME_EXCHANGE):
        raise OSError(ctypes.get_errno(), "could not swap the new artifact in", str(b))


def _fsync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            _fsync_folder(path)
        else:
            with path.open("rb") as f:
                os.fsync(f.fileno())
    _fsync_folder(folder)


def _fsync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _full_disk_told(target: Path, staging: Path) -> Iterator[None]:
    """DISK instead of the system's error when the volume is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_IS_FULL:
            raise
        free = shutil.disk_usage(target.parent).free
        written = sum(p.stat().st_size for p in staging.rglob("*") if p.is_file())
        raise ParetronError(
            Problem(
                Code.DISK,
                f"{error.strerror} after {written} bytes, {free} bytes free",
                where=str(target),
                fix="free some space; `paretron plan` says how much is needed",
            )
        ) from error
