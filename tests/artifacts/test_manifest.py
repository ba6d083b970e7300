"""The manifest: every change after publishing is found and named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from paretron.artifacts.jsonfile import dump
from paretron.artifacts.manifest import (
    MANIFEST,
    Identity,
    Provenance,
    identify,
    identity,
    read_manifest,
    verify,
    write_manifest,
)
from paretron.errors import Code, ParetronError

MADE = Provenance(
    kind="student", parents={"teacher": "ab12"}, settings={"lr": 1e-4}, seed=3, stamp="TEST"
)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = tmp_path / "artifact"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.bin").write_bytes(bytes(range(256)))
    (folder / "sub/b.txt").write_text("text")
    (folder / "sub" / MANIFEST).write_text("{}")  # one of a part is a file like any other
    write_manifest(folder, MADE)
    return folder


def causes(folder: Path) -> dict[str, str]:
    with pytest.raises(ParetronError) as caught:
        verify(folder)
    assert {p.code for p in caught.value.problems} == {Code.INPUT_MANIFEST}
    assert caught.value.exit_code == 3
    assert all(p.fix for p in caught.value.problems)
    return {os.path.relpath(p.where, folder): p.cause for p in caught.value.problems}


def test_what_was_written_verifies(artifact: Path) -> None:
    manifest = verify(artifact)
    assert set(manifest["files"]) == {"a.bin", "sub/b.txt", f"sub/{MANIFEST}"}
    assert manifest["parents"] == {"teacher": "ab12"}
    assert (manifest["kind"], manifest["seed"], manifest["stamp"]) == ("student", 3, "TEST")
    assert {"paretron", "python", "torch"} <= set(manifest["versions"])


@pytest.mark.parametrize("name", ["a.bin", "sub/b.txt", f"sub/{MANIFEST}"])
@pytest.mark.parametrize("how", ["byte", "longer", "shorter"])
def test_a_changed_byte(name: str, how: str, artifact: Path) -> None:
    data = bytearray((artifact / name).read_bytes())
    if how == "byte":
        data[-1] ^= 1
    elif how == "longer":
        data += b"x"
    else:
        del data[-1]
    (artifact / name).write_bytes(data)
    assert causes(artifact) == {name: "its bytes differ from the manifest"}


def test_added_removed_and_changed_at_once(artifact: Path) -> None:
    (artifact / "new").write_text("")
    (artifact / "a.bin").unlink()
    (artifact / "sub/b.txt").write_text("test")
    assert causes(artifact) == {
        "new": "the manifest does not list it",
        "a.bin": "listed in the manifest, but not here",
        "sub/b.txt": "its bytes differ from the manifest",
    }


def test_a_link_in_place_of_a_file(artifact: Path, tmp_path: Path) -> None:
    (artifact / "a.bin").unlink()
    (artifact / "a.bin").symlink_to(tmp_path / "nowhere")
    (artifact / "stray").symlink_to(tmp_path / "nowhere")
    assert set(causes(artifact)) == {"a.bin", "stray"}


@pytest.mark.parametrize(
    "edit",
    [
        {"seed": 4},
        {"parents": {}},
        {"stamp": None},
        {"files": {}},
        {"files": []},
        {"self_sha256": "0" * 64},
        {"self_sha256": None},
        {"more": 1},
    ],
    ids=str,
)
def test_an_edited_manifest(edit: dict[str, object], artifact: Path) -> None:
    path = artifact / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    assert set(causes(artifact)) == {MANIFEST}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": {}}', "\0"])
def test_no_manifest_at_all(text: str, artifact: Path) -> None:
    (artifact / MANIFEST).write_text(text)
    assert set(causes(artifact)) == {MANIFEST}
    (artifact / MANIFEST).unlink()
    assert set(causes(artifact)) == {"."}


def test_nonsense_with_a_right_sum(artifact: Path) -> None:
    """Whoever edits may compute the sum again: that is not a crash either."""
    from paretron.artifacts.manifest import _self_sha256

    for entry in (1, {}, {"sha256": 1, "bytes": "x"}, {"sha256": "x", "bytes": 256}):
        body = json.loads((artifact / MANIFEST).read_text())
        del body["self_sha256"]
        body["files"]["a.bin"] = entry
        body["files"]["../../etc/passwd"] = entry
        body["self_sha256"] = _self_sha256(body)
        dump(artifact / MANIFEST, body)
        assert len(causes(artifact)) == 2


def test_equal_work_is_equal_bytes(artifact: Path) -> None:
    before = (artifact / MANIFEST).read_bytes()
    write_manifest(artifact, MADE)
    assert (artifact / MANIFEST).read_bytes() == before


def test_identity_is_of_the_content(artifact: Path, tmp_path: Path) -> None:
    assert identity(artifact) == read_manifest(artifact)["self_sha256"]
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.json").write_text("{}")
    (plain / "model.safetensors").write_bytes(b"1")
    first = identity(plain)
    (plain / "README.md").write_text("does not count")
    assert identity(plain) == first
    (plain / "model.safetensors").write_bytes(b"2")
    assert identity(plain) != first


def test_a_card_is_a_file_like_any_other(artifact: Path) -> None:
    """Every byte of every file counts, the manifest's spaces included."""
    (artifact / "README.md").write_text("# A card\n")
    write_manifest(artifact, MADE)
    verify(artifact)
    names = ["README.md", MANIFEST, "sub/b.txt"]
    for name in names:
        content = (artifact / name).read_bytes()
        for position in range(0, len(content), 7):
            changed = bytearray(content)
            changed[position] ^= 1
            (artifact / name).write_bytes(changed)
            assert set(causes(artifact)) == {name}
        (artifact / name).write_bytes(content + b"\n")
        assert set(causes(artifact)) == {name}
        (artifact / name).write_bytes(content)
    verify(artifact)


def test_what_no_artifact_holds(artifact: Path, tmp_path: Path) -> None:
    (artifact / "empty").mkdir()
    (artifact / "empty/inner").mkdir()
    os.mkfifo(artifact / "pipe")
    (artifact / "link").symlink_to("a.bin")
    (artifact / "linked").symlink_to(artifact / "sub")
    assert set(causes(artifact)) == {"empty", "empty/inner", "pipe", "link", "linked"}


def test_the_right_bytes_behind_a_link_are_not_the_artifact_s(
    artifact: Path, tmp_path: Path
) -> None:
    (artifact / "a.bin").rename(tmp_path / "a.bin")
    (artifact / "a.bin").symlink_to(tmp_path / "a.bin")
    (artifact / "sub/b.txt").unlink()
    (artifact / "sub/b.txt").mkdir()
    assert causes(artifact) == {"a.bin": "a link, not a file", "sub/b.txt": "not a file"}


def test_a_manifest_behind_a_link_or_a_pipe(artifact: Path, tmp_path: Path) -> None:
    (artifact / MANIFEST).rename(tmp_path / MANIFEST)
    (artifact / MANIFEST).symlink_to(tmp_path / MANIFEST)
    with pytest.raises(ParetronError, match="link out"):
        verify(artifact)
    (artifact / MANIFEST).unlink()
    os.mkfifo(artifact / MANIFEST)
    with pytest.raises(ParetronError, match="a pipe"):
        verify(artifact)


def test_without_a_manifest_the_next_command_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ParetronError) as caught:
        verify(tmp_path)
    assert f"paretron inspect {tmp_path}" in caught.value.problems[0].fix


def test_identity_says_whether_a_sum_was_known(artifact: Path, tmp_path: Path) -> None:
    assert identify(artifact) == Identity(identity(artifact), verified=True)
    (artifact / "a.bin").write_bytes(b"x")
    with pytest.raises(ParetronError, match="differ"):
        identify(artifact)
    plain = tmp_path / "plain"
    plain.mkdir()
    assert not identify(plain).verified
    (plain / "model.safetensors").write_bytes(b"1")
    assert identify(plain) == Identity(identity(plain), verified=False)
