"""What of the optional packages is installed here, and whether it is recent enough."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata

from paretron.errors import Code, Problem

# Below these a known vulnerability is open.
SAFE_FLOORS = {"torch": "2.10", "transformers": "5.3", "onnx": "1.21", "vllm": "0.18"}


def installed(distribution: str) -> str | None:
    """The version of a distribution in this environment, None when it is absent."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "1.32.0+cpu" -> (1, 32, 0)."""
    numbers = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def missing_or_old(floors: Mapping[str, str], *, install: str) -> list[Problem]:
    """A problem for each distribution that is absent or below its floor; `install` mends it.

    OPTIONAL_MISSING, OPTIONAL_OLD.
    """
    problems = []
    for name, floor in floors.items():
        found = installed(name)
        if found is None:
            cause = f"{name} is not installed"
            problems.append(Problem(Code.OPTIONAL_MISSING, cause, fix=install))
        elif release(found) < release(floor):
            cause = f"{name} {found} is older than {floor}"
            problems.append(Problem(Code.OPTIONAL_OLD, cause, fix=install))
    return problems
