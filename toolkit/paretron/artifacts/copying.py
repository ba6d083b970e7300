"""Files that are published as they are: a whole checkpoint, or what a stage's state holds."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from paretron.artifacts.companions import write_companions
from paretron.artifacts.config import DTYPE_NAMES, servable_config
from paretron.artifacts.guard import inside
from paretron.artifacts.reader import INDEX, Checkpoint
from paretron.artifacts.shards import weight_files


def copy_checkpoint(source: Path, folder: Path) -> None:
    """Copy a checkpoint's weights byte for byte and write what stands beside them.

    A link to them would do if nobody ever changed the source.
    """
    checkpoint = Checkpoint.open(source)
    index = inside(source, INDEX)
    for path in (*weight_files(source).files, *([index] if index else [])):
        target = folder / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    config = servable_config(checkpoint.config, dtype=DTYPE_NAMES[checkpoint.dtype])
    write_companions(folder, config=config, source=source)


def link_or_copy(source: Path | str, target: Path | str) -> None:
    """A second name for a file that loses its first one soon; a copy where there are no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
