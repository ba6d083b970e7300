"""What an exporter is, so that a third party can add one.

An exporter is an object registered under the entry-point group `paretron.exporters`; it imports
torch and its third-party packages only when it exports, because planning asks it too.
"""

from __future__ import annotations

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
        """The name in recipes; an engine whose `wants` says the same runs what it makes."""

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


def not_quantised(export: Export) -> list[Problem]:
    """The problem of an exporter that has no quantised form, when one is asked for."""
    if export.quantize is None:
        return []
    return [
        Problem(
            Code.UNSUPPORTED,
            f"{export.to} has no quantised form {export.quantize!r}",
            fix="leave `quantize` out, or export to gguf, which has q8_0",
        )
    ]
