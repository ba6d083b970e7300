"""What an exporter is, so that a third party can add one.

An exporter is an object registered under the entry-point group `paretron.exporters`; it imports
torch and its third-party packages only when it exports, because planning asks it too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from paretron.artifacts.manifest import Provenance
from paretron.data.texts import Texts
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

        UNSUPPORTED (family, dtype, sizes), RECIPE_VALUE (a degree that does not divide the model),
        OPTIONAL_MISSING, OPTIONAL_OLD; `not_taken` says what of the section has no meaning here.
        """

    def needs(self, export: Export, *, params: int, embedding_params: int) -> tuple[int, int]:
        """Bytes of memory that it holds at least, and of disk beside what it publishes.

        `embedding_params`, those of embedding and head, are among `params`. What streams holds 0.
        """

    def export(
        self,
        source: Path,
        *,
        export: Export,
        out: Path,
        provenance: Provenance,
        texts: Texts | None = None,
        overwrite: bool = False,
        on_event: OnEvent,
    ) -> ParityReport:
        """Export the checkpoint folder `source` to one artifact at `out`, with its parity.json.

        `texts` are there for every export with `quantize`; USAGE where it needs them and has none.
        It is published only after its gates have passed; GATE_PARITY or GATE_RELOAD otherwise.
        """


def not_taken(export: Export, *, takes: frozenset[str]) -> list[Problem]:
    """The problems of settings that an exporter has no use for; `takes` are those it has."""
    stated = export.model_fields_set - takes - {"to"}
    default = Export(to=export.to)
    return [
        Problem(
            Code.UNSUPPORTED,
            f"{export.to} takes no `{name}`",
            where=f"export.{name}",
            fix=f"leave it out; {export.to} takes {', '.join(sorted(takes)) or 'no settings'}",
        )
        for name in sorted(stated)
        if getattr(export, name) != getattr(default, name)
    ]
