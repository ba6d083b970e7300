"""What a shell offers when a word is begun: names that are known without reading anything."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


def recipe_names(incomplete: str) -> list[str]:
    """The shipped recipes."""
    from paretron.cli.recipes import shipped

    return _beginning(incomplete, shipped())


def exporter_names(incomplete: str) -> list[str]:
    """The installed exporters."""
    from paretron.plugins import EXPORTERS, plugin_names

    return _beginning(incomplete, plugin_names(EXPORTERS))


def engine_names(incomplete: str) -> list[str]:
    """The installed engines."""
    from paretron.plugins import ENGINES, plugin_names

    return _beginning(incomplete, plugin_names(ENGINES))


def tool_names(incomplete: str) -> list[str]:
    """The benchmarks of others that `bench` knows."""
    from paretron_profiling.bench.tools import TOOLS

    return _beginning(incomplete, TOOLS)


def recipe_keys(incomplete: str) -> list[str]:
    """The keys that `--set` takes, each with its equals sign."""
    return _beginning(incomplete, _keys())


def _keys() -> Iterator[str]:
    from paretron.recipe.load import keys_of

    for key in keys_of():
        yield f"{key}="


def _beginning(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
