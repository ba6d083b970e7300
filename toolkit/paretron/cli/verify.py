"""`paretron verify`: is an artifact whole, and is it what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paretron.cli import options as o
from paretron.cli.output import bytes_text, say_json


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An artifact, or a run's folder.")],
    as_json: o.Json = False,
    verbose: o.Verbose = False,
) -> None:
    """Compare every file of an artifact, or of all of a run's, with its manifest."""
    from paretron.artifacts.manifest import MANIFEST
    from paretron.artifacts.manifest import verify as verify_artifact

    artifacts = [folder]
    if not (folder / MANIFEST).is_file() and (folder / "stages").is_dir():
        artifacts = sorted(p for p in (folder / "stages").iterdir() if p.is_dir())
        artifacts += [p for p in [folder / "report"] if p.is_dir()]
        artifacts = artifacts or [folder]  # a run without a finished stage has nothing to compare
    files = total = 0
    for artifact in artifacts:
        listed = verify_artifact(artifact)["files"]
        files += len(listed)
        total += sum(f["bytes"] for f in listed.values())
    if as_json:
        say_json({"ok": True, "artifacts": len(artifacts), "files": files, "bytes": total})
    else:
        typer.echo(f"ok: {len(artifacts)} artifacts, {files} files, {bytes_text(total)}")
