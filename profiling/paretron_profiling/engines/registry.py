"""Engines by name, from the installed packages' entry points."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import cast

from paretron.errors import Code, ParetronError, Problem
from paretron_profiling.engines.engine import Engine

GROUP = "paretron.engines"


def find_engine(name: str) -> Engine:
    """The engine registered under a name; RECIPE_VALUE when there is none."""
    for point in entry_points(group=GROUP, name=name):
        return cast(Engine, point.load())
    known = ", ".join(sorted({point.name for point in entry_points(group=GROUP)}))
    raise ParetronError(
        Problem(
            Code.RECIPE_VALUE,
            f"no engine is called {name!r}",
            where="profile.engines",
            fix=f"one of {known}",
        )
    )
