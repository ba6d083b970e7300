"""Group I, models by hub id: never asked for offline, and the same commit from plan to result."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from faults import hub_worker
from faults.broken import RECIPE, set_config
from faults.conftest import Cli, Refused
from faults.fakehub import MODEL, FakeHub, serve
from makers import PicoMaker
from paretron.errors import Code

FIRST, SECOND = "1" * 40, "2" * 40
HUB_RECIPE = RECIPE.replace("./model", MODEL)

# Every socket of a process, counted where Python makes them.
_COUNTED = """
import sys
made = []
sys.addaudithook(lambda event, arguments: event == "socket.__new__" and made.append(arguments))
from paretron.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    print("exit", end.code, "sockets", len(made))
"""


def online(tmp_path: Path, **more: str) -> dict[str, str]:
    """The environment of a process that may use the network, with a cache of its own."""
    kept = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    return kept | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"} | more


def sockets_of(tmp_path: Path, *arguments: str) -> tuple[int, int, str]:
    done = subprocess.run(
        [sys.executable, "-c", _COUNTED, *arguments],
        capture_output=True, text=True, check=True, env=online(tmp_path), cwd=tmp_path,
    )  # fmt: skip
    found = re.search(r"exit (\d+) sockets (\d+)", done.stdout)
    assert found, done
    return int(found[1]), int(found[2]), done.stderr


def test_i26_a_hub_id_offline(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "recipe.yaml").write_text(HUB_RECIPE)
    start = time.process_time()
    refused(
        "plan", tmp_path / "recipe.yaml", "--offline",
        code=Code.INPUT_OFFLINE, names=MODEL,
    )  # fmt: skip
    assert time.process_time() - start < 2


def test_i26_offline_makes_no_socket(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(HUB_RECIPE)
    code, sockets, said = sockets_of(tmp_path, "plan", "recipe.yaml", "--offline")
    assert (code, sockets) == (3, 0), said


@pytest.mark.parametrize("offline", [True, False])
def test_i26_a_local_path_makes_no_socket(offline: bool, pico: PicoMaker, tmp_path: Path) -> None:
    pico()
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    mode = ["--offline"] if offline else []
    code, sockets, said = sockets_of(tmp_path, "plan", "recipe.yaml", *mode)
    assert (code, sockets) == (0, 0), said


def test_i27_a_revision_that_moves_during_a_run(pico: PicoMaker, tmp_path: Path) -> None:
    hub = FakeHub({FIRST: pico(name="first"), SECOND: pico(name="second")})
    set_config(tmp_path / "second", max_position_embeddings=256)
    (tmp_path / "recipe.yaml").write_text(HUB_RECIPE)
    with serve(hub) as address:
        done = subprocess.run(
            [sys.executable, hub_worker.__file__, "recipe.yaml", "out"],
            capture_output=True, text=True, env=online(tmp_path, HF_ENDPOINT=address), cwd=tmp_path,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert hub.asked.count(f"/api/models/{MODEL}/revision/main") == 1
    hub.asked.append(f"/api/models/{MODEL}/revision/main")
    assert hub.main() == SECOND  # whoever had asked again would have got this one
    fetched = [path for path in hub.asked if "/resolve/" in path]
    assert any(path.endswith("/model.safetensors") for path in fetched)
    assert all(f"/resolve/{FIRST}/" in path for path in fetched)

    plan = json.loads((tmp_path / "out/plan.json").read_text())
    assert plan["teacher"]["commit"] == FIRST
    events = [json.loads(line) for line in (tmp_path / "out/events.jsonl").read_text().splitlines()]
    (given,) = [e for e in events if e["kind"] == "given"]
    assert given["commit"] == FIRST
    manifest = json.loads((tmp_path / "out/stages/score/manifest.json").read_text())
    assert manifest["unverified"] == []  # the hub's sum of the weights was compared
    assert sorted(manifest["parents"]) == ["data", "model"]


def test_i27_a_broken_hub_is_told_in_our_words(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "recipe.yaml").write_text(HUB_RECIPE)
    with serve(FakeHub({FIRST: tmp_path / "nothing-here"})) as address:
        done = subprocess.run(
            [sys.executable, "-m", "paretron", "plan", "recipe.yaml"],
            capture_output=True, text=True, env=online(tmp_path, HF_ENDPOINT=address), cwd=tmp_path,
        )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert f"error: {MODEL}@main: " in done.stderr
    assert "Traceback" not in done.stderr
