"""Loads checkpoints as a user would, in a process that wrote none of them, and saves their logits.

Arguments: a file for the logits, then the folders.
"""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors.torch import save_file

from reload import check_reload


def main() -> None:
    """Reload every folder; an error of ours ends the process with its own exit code."""
    from paretron.errors import ParetronError

    target, *folders = map(Path, sys.argv[1:])
    try:
        save_file({folder.parent.name: check_reload(folder) for folder in folders}, target)
    except ParetronError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
