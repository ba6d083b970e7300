"""Where an ONNX graph may keep its weights: in plain files beside it, and nowhere else.

A graph names any file of the machine that loads it, and runtimes follow links and paths.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from paretron.errors import Code, ParetronError, Problem

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


def beside(folder: Path, name: str, *, where: str) -> Path:
    """The file that a graph or its settings name, in their own folder.

    Errors: INPUT_UNSAFE_PATH (a path, a symbolic or a hard link), INPUT_MISSING.
    """
    if not _PLAIN_NAME.fullmatch(name):
        cause = f"{name[:80]!r} is not a plain file name"
        raise ParetronError(Problem(Code.INPUT_UNSAFE_PATH, cause, where=where))
    path = folder / name
    try:
        status = os.lstat(path)
    except FileNotFoundError as error:
        raise ParetronError(Problem(Code.INPUT_MISSING, f"no file {name}", where=where)) from error
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        raise ParetronError(Problem(Code.INPUT_UNSAFE_PATH, f"{name} is a link", where=where))
    return path
