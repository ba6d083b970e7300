"""What an exporter is, so that a third party can add one.

An exporter is an object registered under the entry-point group `paretron.exporters`; it imports
torch and its third-party packages only when it exports, because planning asks it too.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from paretron.artifacts.manifest import Provenance
from paretron.errors import Code, Problem
from paretron.evaluate.parity import ParityReport
from paretron.recipe import Export

OnEvent = Callable[[str, Mapping[str, object]], None]


class Exporter(Protocol):
    """A form that a checkpoint can be exported to."""

    @property
    def name(self) -> str:
        """The name in recipes."""

    @property
    def makes(self) -> str:
        """The kind of export; an engine whose `wants` says the same runs it."""

    def problems(self, config: Mapping[str, Any], *, export: Export) -> list[Problem]:
        """Why a model with this config.json cannot be exported here; found in milliseconds.

        UNSUPPORTED (family, dtype, sizes), OPTIONAL_MISSING, OPTIONAL_OLD.
        """

    def export(
        self,
        source: Path,
        *,
        export: Export,
        out: Path,
        provenance: Provenance,
        overwrite: bool = False,
        on_event: OnEvent,
    ) -> ParityReport:
        """Export the checkpoint folder `source` to one artifact at `out`, with its parity.json.

        It is published only after its gates have passed; GATE_PARITY or GATE_RELOAD otherwise.
        """


def missing_or_old(extra: str, floors: Mapping[str, str]) -> list[Problem]:
    """A problem for each distribution of one of our extras that is absent or below its floor."""
    fix = f'pip install "paretron[{extra}]"'
    problems = []
    for name, floor in floors.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(Problem(Code.OPTIONAL_MISSING, f"{name} is not installed", fix=fix))
            continue
        if _release(found) < _release(floor):
            cause = f"{name} {found} is older than {floor}"
            problems.append(Problem(Code.OPTIONAL_OLD, cause, fix=fix))
    return problems


def _release(version: str) -> tuple[int, ...]:
    """The leading numbers: "1.32.0+cpu" -> (1, 32, 0)."""
    numbers = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
