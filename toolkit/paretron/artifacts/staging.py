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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from paretron.artifacts.manifest import MANIFEST, Provenance, write_manifest
from paretron.errors import Code, ParetronError, Problem

_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def staged(
    target: Path,
    *,
    provenance: Provenance | Callable[[], Provenance],
    overwrite: bool = False,
    needed_bytes: int | None = None,
    digests: Mapping[str, str] | None = None,
) -> Iterator[Path]:
    """Yield a fresh folder beside `target`; on a clean exit it becomes `target`, whole.

    `provenance` may be a function, asked when everything is written; `digests` gives the sha256 of
    files that were hashed while they were written. With `needed_bytes` a volume with less space is
    refused before any work. Errors: OUT_EXISTS when the target is there and `overwrite` is not
    asked for, LOCKED when another process is writing the same target, DISK when the volume is
    full. With any error the staging folder is removed and what was at `target` before stays
    untouched.
    """
    target = Path(os.path.abspath(target))
    refuse_existing(target, overwrite=overwrite)
    staging = target.parent / f".{target.name}.staging"
    lock = target.parent / f".{target.name}.lock"
    with _full_disk_told(target, staging, needed_bytes), locked(lock, what=str(target)):
        refuse_existing(target, overwrite=overwrite)  # another process may have published it
        _remove(staging)  # a killed process left it
        _refuse_too_little_space(target, needed_bytes)
        try:
            with _full_disk_told(target, staging, needed_bytes):
                staging.mkdir()
                yield staging
                made = provenance() if callable(provenance) else provenance
                write_manifest(staging, made, digests=digests)
                _fsync_tree(staging)
                _publish(staging, target, overwrite=overwrite)
        finally:
            _remove(staging)


def refuse_existing(target: Path, *, overwrite: bool) -> None:
    """OUT_EXISTS when something is at `target` that nobody said to replace, or that is not ours.

    What may be replaced is an artifact (it has a manifest) or an empty folder.
    """
    if not os.path.lexists(target):
        return
    if not overwrite:
        cause, fix = "already exists", "name another --out, or add --overwrite"
    elif _is_ours(target):
        return
    else:
        cause = "holds something that Paretron did not write, which --overwrite would remove"
        fix = "name another --out, or remove it yourself"
    raise ParetronError(Problem(Code.OUT_EXISTS, cause, where=str(target), fix=fix))


def _is_ours(target: Path) -> bool:
    if not target.is_dir():
        return target.is_symlink() and not target.exists()  # a link to nowhere holds nothing
    return (target / MANIFEST).is_file() or not any(target.iterdir())


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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:  # a file stands where the folder should be
        number = errno.ENOTDIR
        raise NotADirectoryError(number, os.strerror(number), error.filename) from error
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
        f = open(path, "a+", opener=_no_link)  # noqa: SIM115
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):  # some say EACCES for held
                f.close()
                raise _no_locks(what, error) from error
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


def _no_link(path: str, flags: int) -> int:
    """Open a file, but not what somebody's link at its place leads to: ELOOP."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _no_locks(what: str, error: OSError) -> ParetronError:
    return ParetronError(
        Problem(
            Code.LOCKED,
            f"this file system cannot lock a file ({error.strerror})",
            where=what,
            fix="name an --out on a local disk, or mount this one with locks",
        )
    )


def _holder(f: TextIO) -> str:
    """Who says to hold the lock; it may have taken it only just now and still be writing that."""
    for _ in range(20):
        time.sleep(0.05)
        f.seek(0)
        if text := f.read(200):
            return text
    return "unknown"


def _remove(staging: Path) -> None:
    """Remove what a staging folder's place holds: after a swap that may be a file or a link."""
    if staging.is_symlink() or staging.is_file():
        staging.unlink()
    else:
        shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, target: Path, *, overwrite: bool) -> None:
    if overwrite and os.path.lexists(target):
        _exchange(staging, target)  # the old one is now at `staging` and removed by the caller
    else:
        os.rename(staging, target)
    _fsync_folder(target.parent)


def _exchange(a: Path, b: Path) -> None:
    """Swap two paths in one step, so that a reader sees the old or the new, never neither.

    Where the file system knows no such step (network file systems do not) nothing is replaced:
    two renames would leave a moment with neither.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not libc.renameat2(_AT_FDCWD, bytes(a), _AT_FDCWD, bytes(b), _RENAME_EXCHANGE):
        return
    number = ctypes.get_errno()
    if number not in _NO_EXCHANGE:
        raise OSError(number, "could not swap the new artifact in", str(b))
    raise ParetronError(
        Problem(
            Code.OUT_EXISTS,
            f"this file system cannot replace a folder in one step ({os.strerror(number)})",
            where=str(b),
            fix="remove it and run again without --overwrite, or name another --out",
        )
    )


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
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems sync no folders
            raise
    finally:
        os.close(fd)


def _refuse_too_little_space(target: Path, needed_bytes: int | None) -> None:
    """DISK when the volume has less room than is known to be needed."""
    free = shutil.disk_usage(target.parent).free
    if needed_bytes is not None and free < needed_bytes:
        raise ParetronError(
            Problem(
                Code.DISK,
                f"{needed_bytes} bytes needed, {free} bytes free",
                where=str(target),
                fix="free some space, or name an --out on a larger volume",
            )
        )


@contextmanager
def _full_disk_told(target: Path, staging: Path, needed_bytes: int | None) -> Iterator[None]:
    """DISK instead of the system's error when the volume is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_IS_FULL:
            raise
        free = shutil.disk_usage(target.parent).free
        written = sum(p.stat().st_size for p in staging.rglob("*") if p.is_file())
        of_needed = f" of {needed_bytes} needed" if needed_bytes is not None else ""
        raise ParetronError(
            Problem(
                Code.DISK,
                f"{error.strerror} after {written} bytes{of_needed}, {free} bytes free",
                where=str(target),
                fix="free some space; `paretron plan` says how much is needed",
            )
        ) from error
