"""A model that has learned the bundled task."""

from __future__ import annotations

from pathlib import Path

import pytest

from picotask import learn


@pytest.fixture(scope="session")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico model that knows the language of the bundled task; not to be changed."""
    from pico import make_pico

    return learn(make_pico(tmp_path_factory.mktemp("learned") / "model", num_hidden_layers=2))
