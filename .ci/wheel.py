"""Check that a wheel holds every tracked file of the packages, and nothing else."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOTS = {  # folder in the tree -> folder in the wheel
    "toolkit/paretron/": "paretron/",
    "exporters/paretron_exporters/": "paretron_exporters/",
    "profiling/paretron_profiling/": "paretron_profiling/",
    "recipes/": "paretron_recipes/",
}


def tracked() -> set[str]:
    """Where every tracked or new source file should be in the wheel."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *ROOTS]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")
    return {
        there + name.removeprefix(here)
        for name in names
        for here, there in ROOTS.items()
        if name.startswith(here) and Path(name).is_file()
    }


def main() -> int:
    """Print each difference; exit 1 when there is one."""
    with zipfile.ZipFile(sys.argv[1]) as wheel:
        packed = {n for n in wheel.namelist() if ".dist-info/" not in n}
    missing, extra = sorted(tracked() - packed), sorted(packed - tracked())
    for name in missing:
        print(f"not in the wheel: {name}", file=sys.stderr)
    for name in extra:
        print(f"in the wheel, not in the tree: {name}", file=sys.stderr)
    print(f"{sys.argv[1]}: {len(packed)} files")
    return 1 if missing or extra else 0


if __name__ == "__main__":
    sys.exit(main())
