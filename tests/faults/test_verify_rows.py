"""Row S9: whatever changes in a published artifact, `paretron verify` names the file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from faults.conftest import Cli, Refused
from makers import PicoMaker
from paretron.artifacts.manifest import MANIFEST
from paretron.artifacts.reader import SINGLE
from paretron.cli.main import main
from paretron.errors import Code


@pytest.fixture(scope="module")
def exported(_pico_cache: PicoMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published repository with a card."""
    out = tmp_path_factory.mktemp("exported") / "out"
    with pytest.raises(SystemExit) as ended:
        main(["export", str(_pico_cache()), "--to", "hf", "--out", str(out), "--quiet"])
    assert not ended.value.code
    return out


@pytest.fixture
def artifact(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "out"))


def change_a_byte(file: Path, *, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def edit_manifest(folder: Path) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(content | {"seed": 7}, indent=2, sort_keys=True))


def space_in_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text() + " ")


def swap_for_a_link(folder: Path) -> None:
    (folder / SINGLE).rename(folder.parent / "elsewhere")
    (folder / SINGLE).symlink_to("../elsewhere")


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "added": (lambda folder: (folder / "more.txt").write_text(""), "more.txt"),
    "added-hidden": (lambda folder: (folder / ".more").write_text(""), ".more"),
    "added-folder": (lambda folder: (folder / "more").mkdir(), "more"),
    "added-link": (lambda folder: (folder / "more").symlink_to(SINGLE), "more"),
    "added-pipe": (lambda folder: os.mkfifo(folder / "more"), "more"),
    "removed": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
    "removed-card": (lambda folder: (folder / "README.md").unlink(), "README.md"),
    "linked": (swap_for_a_link, SINGLE),
    "manifest-edited": (edit_manifest, MANIFEST),
    "manifest-space": (space_in_manifest, MANIFEST),
    "manifest-empty": (lambda folder: (folder / MANIFEST).write_text(""), MANIFEST),
}


@pytest.mark.parametrize("change", CHANGES)
def test_s9_a_change_is_named(change: str, artifact: Path, cli: Cli, refused: Refused) -> None:
    assert cli("verify", artifact).code == 0
    make, name = CHANGES[change]
    make(artifact)
    refused("verify", artifact, code=Code.INPUT_MANIFEST, names=str(artifact / name))


def test_s9_a_byte_of_any_file(artifact: Path, refused: Refused, cli: Cli) -> None:
    files = sorted(p for p in artifact.rglob("*") if p.is_file())
    assert {"README.md", MANIFEST, SINGLE} < {p.name for p in files}
    for file in files:
        for at in (0, file.stat().st_size // 2, -1):
            change_a_byte(file, at=at)
            refused("verify", artifact, code=Code.INPUT_MANIFEST, names=str(file))
            change_a_byte(file, at=at)
    assert cli("verify", artifact).code == 0


def test_s9_as_json(artifact: Path, cli: Cli) -> None:
    good = json.loads(cli("verify", artifact, "--json").out)
    assert good["ok"] is True
    assert good["files"] == sum(p.is_file() for p in artifact.rglob("*")) - 1
    change_a_byte(artifact / "README.md", at=9)
    (artifact / "more.txt").write_text("")
    bad = cli("verify", artifact, "--json")
    assert bad.code == 3
    told = {p["where"]: p for p in json.loads(bad.out)["problems"]}
    assert set(told) == {str(artifact / "README.md"), str(artifact / "more.txt")}
    assert all(p["code"] == "input.manifest" and p["fix"] for p in told.values())


def test_s9_nothing_to_compare_with(pico: PicoMaker, refused: Refused, tmp_path: Path) -> None:
    folder = pico()
    refused("verify", folder, code=Code.INPUT_MANIFEST, names=f"paretron inspect {folder}")
    (tmp_path / "run/stages").mkdir(parents=True)
    refused("verify", tmp_path / "run", code=Code.INPUT_MANIFEST, names="no manifest.json")
    refused("verify", tmp_path / "nowhere", code=Code.INPUT_MANIFEST, names="no manifest.json")
