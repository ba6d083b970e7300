"""The standard library of the running interpreter: a real corpus that every machine has.

Two kinds of text. The single-file modules are part `pretrain`: a teacher can be trained on them.
The packages differ in kind (networking, parsing, user interfaces) and are split further by a hash
of each file's path into `train`, `calibration` and `validation`, so that correcting the teacher
means something and no two parts share a file.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from paretron.errors import Code, ParetronError, Problem

PRETRAIN = "pretrain"
# The hash of a path falls into one of 100 buckets; the first go to validation, the next to
# calibration, the rest to train.
_VALIDATION_BUCKETS = range(12)
_CALIBRATION_BUCKETS = range(12, 22)

_EXCLUDED_FOLDERS = frozenset(
    {
        # absent from many installations, or gone from newer interpreters
        "distutils", "ensurepip", "lib2to3", "test", "tests", "idle_test",
        # tables and caches, not programs
        "encodings", "pydoc_data", "__phello__", "__pycache__",
        # not the standard library
        "site-packages", "dist-packages",
    }
)  # fmt: skip
# What a machine's builder or owner wrote, and it differs between machines.
_EXCLUDED_PREFIXES = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize")


def stdlib_files(part: str, *, root: Path | None = None) -> list[Path]:
    """The files of one part in a fixed order; `root` defaults to the interpreter's own library.

    INPUT_CORPUS when the interpreter has no such files (some embedded ones keep a zip archive).
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    files = [name for name in sorted(_modules(root)) if part_of(name) == part]
    if not files:
        raise ParetronError(
            Problem(
                Code.INPUT_CORPUS,
                f"the standard library has no sources for the part {part!r}",
                where=str(root),
                fix="use an interpreter with its .py files, or name files by path",
            )
        )
    return [root / name for name in files]


def part_of(name: str) -> str:
    """The part of a file, from its `/`-separated path below the library's folder."""
    if "/" not in name:
        return PRETRAIN
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 100
    if bucket in _VALIDATION_BUCKETS:
        return "validation"
    return "calibration" if bucket in _CALIBRATION_BUCKETS else "train"


def _modules(root: Path) -> Iterator[str]:
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in _EXCLUDED_FOLDERS and not _is_local(f)]
        for name in names:
            path = Path(folder, name)
            # A link leads to what a distribution or an administrator put in place of a module.
            wanted = name.endswith(".py") and not _is_local(name) and not path.is_symlink()
            if wanted and path.stat().st_size:
                yield path.relative_to(root).as_posix()


def _is_local(name: str) -> bool:
    return name.startswith(_EXCLUDED_PREFIXES)
