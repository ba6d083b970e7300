"""What every test may rely on: no network, nothing from the user's own caches, pico models."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hypothesis
import pytest

from makers import PicoMaker

# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile("paretron", deadline=None)
hypothesis.settings.load_profile("paretron")

LOCAL_HOSTS = ("127.0.0.1", "::1", "localhost", "0.0.0.0", "")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that would leave this machine fails the test that makes it."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and address[0] not in LOCAL_HOSTS:
            pytest.fail(f"a connection to {address[0]}:{address[1]} was tried")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session")
def _pico_cache(tmp_path_factory: pytest.TempPathFactory) -> PicoMaker:
    from pico import make_pico

    made: dict[str, Path] = {}

    def get(family: str = "llama", **config: Any) -> Path:
        key = repr((family, sorted(config.items())))
        if key not in made:
            made[key] = make_pico(tmp_path_factory.mktemp("pico") / "model", family, **config)
        return made[key]

    return get


@pytest.fixture
def pico(_pico_cache: PicoMaker, tmp_path: Path) -> PicoMaker:
    """Make a private copy of a pico checkpoint: `pico("qwen3", num_hidden_layers=2)`."""

    def copy(family: str = "llama", *, name: str = "model", **config: Any) -> Path:
        return Path(shutil.copytree(_pico_cache(family, **config), tmp_path / name))

    return copy


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where `datasets` keeps what it reads, in this process and in those that it starts."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
