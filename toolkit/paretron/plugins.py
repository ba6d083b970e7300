"""Exporters and engines, reached by name through entry points so that anyone can add one."""

from __future__ import annotations

import difflib
from importlib.metadata import entry_points
from typing import Any

from paretron.errors import Code, ParetronError, Problem

EXPORTERS = "paretron.exporters"
ENGINES = "paretron.engines"


def plugin_names(group: str) -> list[str]:
    """The names registered under a group, sorted."""
    return sorted({point.name for point in entry_points(group=group)})


def find_plugin(group: str, name: str, *, where: str) -> Any:
    """The object registered under a name; RECIPE_VALUE naming the closest when there is none.

    OPTIONAL_MISSING when it is registered but cannot be imported.
    """
    kind = group.rpartition(".")[2].removesuffix("s")
    for point in entry_points(group=group, name=name):
        try:
            return point.load()
        except ImportError as error:
            owner = point.dist.name if point.dist else "its distribution"
            raise ParetronError(
                Problem(
                    Code.OPTIONAL_MISSING,
                    f"the {kind} {name!r} of {owner} cannot be imported: {error}",
                    where=where,
                    fix=f"install what it needs: pip install --upgrade {owner}",
                )
            ) from error
    known = plugin_names(group)
    close = difflib.get_close_matches(name, known, n=1)
    raise ParetronError(
        Problem(
            Code.RECIPE_VALUE,
            f"no {kind} is called {name!r}",
            where=where,
            fix=f"did you mean {close[0]}?" if close else f"installed: {', '.join(known)}",
        )
    )
