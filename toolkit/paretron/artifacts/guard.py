"""Which files of a folder may be opened: regular ones that really lie inside of it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from paretron.errors import Code, ParetronError, Problem


def regular_size(path: Path) -> int:
    """The size of a regular file in bytes, links followed; INPUT_FILE for anything else.

    Opening a pipe or a device may block for ever, so this is asked first.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise _refused(Code.INPUT_FILE, str(error.strerror), path, "restore the file") from error
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for name, test in _KINDS.items() if test(status.st_mode)), "special file")
        raise _refused(Code.INPUT_FILE, f"a {kind}, not a file", path, "put the file there")
    return status.st_size


def inside(folder: Path, name: str) -> Path | None:
    """The file `name` of a model's folder, or None when there is nothing of that name.

    It must be a regular file inside of the folder. A link is followed within the folder, and in a
    hub's cache to the blobs beside its snapshots. A file with several names (hard links) must have
    all of them there: what stands under a name outside can be changed, or be somebody else's.
    Errors: INPUT_FILE, INPUT_UNSAFE_PATH.
    """
    path = folder / name
    if not os.path.lexists(path):
        return None
    if path.is_symlink():
        real = Path(os.path.realpath(path))
        if not any(real.is_relative_to(root) for root in _roots(folder)):
            raise _refused(
                Code.INPUT_UNSAFE_PATH,
                "a link out of the folder",
                path,
                "copy the file that it links to into the folder",
            )
    regular_size(path)
    if path.stat().st_nlink > 1 and _names_outside(folder, path):
        raise _refused(
            Code.INPUT_UNSAFE_PATH,
            "a hard link: the same file has a name outside of the folder",
            path,
            f"make it a copy: cp {name} {name}.copy && mv {name}.copy {name}",
        )
    return path


LFS_START = b"version https://git-lfs"


def lfs_pointer(path: Path, *, instead_of: str) -> ParetronError:
    """The error for a file that a clone without git-lfs left in place of the real one."""
    cause = f"a git-lfs pointer, not {instead_of}"
    return _refused(Code.INPUT_LFS, cause, path, "run `git lfs pull` in the model's folder")


def _roots(folder: Path) -> Iterator[Path]:
    """The folder, and the blobs that a snapshot of a hub's cache links to; links resolved."""
    real = Path(os.path.realpath(folder))
    yield real
    if real.parent.name == "snapshots":
        yield real.parent.parent / "blobs"


def _names_outside(folder: Path, path: Path) -> bool:
    """Whether a file has more names than are found below the roots."""
    status = path.stat()
    known = 0
    for root in _roots(folder):
        for parent, _, files in os.walk(root):
            for file in files:
                other = os.lstat(os.path.join(parent, file))
                known += (other.st_dev, other.st_ino) == (status.st_dev, status.st_ino)
    return known < status.st_nlink


_KINDS = {
    "folder": stat.S_ISDIR, "pipe": stat.S_ISFIFO, "socket": stat.S_ISSOCK,
    "device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
}  # fmt: skip


def _refused(code: Code, cause: str, path: Path, fix: str) -> ParetronError:
    return ParetronError(Problem(code, cause, where=str(path)[:300], fix=fix))
