"""A run's report written anew, several runs compared, a profile alone made into a report."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from paretron.artifacts.jsonfile import read_object
from paretron.artifacts.manifest import MANIFEST, Provenance, read_manifest
from paretron.artifacts.staging import refuse_overlap, staged
from paretron.errors import Code, ParetronError, Problem
from paretron.run.measure import PROFILE
from paretron_profiling.report.page import Source, merged, of_profile, write_report

REPORT_JSON = "report.json"
_MAX_BYTES, _MAX_NODES = 1 << 30, 10_000_000  # a profile holds every raw time


def rewrite_report(run: Path) -> Path:
    """Write a run's report anew from its report.json and return its folder."""
    folder = run / "report"
    if not (folder / REPORT_JSON).is_file():
        raise _nothing_here(run)
    manifest = read_manifest(folder)
    provenance = Provenance(
        kind=manifest["kind"],
        parents=manifest["parents"],
        settings=manifest["settings"],
        seed=manifest["seed"],
        stamp=manifest["stamp"],
        stage=manifest["stage"],
        unverified=tuple(manifest.get("unverified", ())),
    )
    content = _checked(folder / REPORT_JSON)
    with (
        _ours(folder / REPORT_JSON),
        staged(folder, provenance=provenance, overwrite=True) as fresh,
    ):
        write_report(content, out=fresh)
    return folder


def stands_alone(sources: Sequence[Path]) -> bool:
    """Whether there is one source, and it is a run with a report of its own, or nothing at all."""
    return len(sources) == 1 and not (sources[0] / PROFILE).is_file()


def report_of(sources: Sequence[Path], *, out: Path | None, overwrite: bool) -> Path:
    """Publish one report of several runs, or of what was profiled alone, in the folder `out`.

    A source is a run's folder, its report, or a folder with profile.json. Errors: USAGE without
    `out`, INPUT_MISSING for a source that is none of these, INPUT_CONFIG for content that is not
    what we write.
    """
    if out is None:
        raise ParetronError(
            Problem(
                Code.USAGE,
                "a report of several runs, or of a profile, needs a folder of its own",
                fix="name one with --out",
            )
        )
    for source in sources:
        refuse_overlap(out, source)
    names = _names(sources)
    found = [_source(source, name, out=out) for source, name in zip(sources, names, strict=True)]
    with _ours(*sources):
        content = merged(found) if len(found) > 1 else found[0].content
        parents = {s.name: s.sha256 for s in found}
        provenance = Provenance(kind="report", parents=parents, stamp=content.get("stamp"))
        with staged(out, provenance=provenance, overwrite=overwrite) as folder:
            write_report(content, out=folder)
    return out


def _names(sources: Sequence[Path]) -> list[str]:
    """What the runs are called: by their folders, with a number where two are called the same."""
    plain = [s.absolute().name or "run" for s in sources]
    names: list[str] = []
    for name in plain:
        numbered = (f"{name}-{k}" for k in count(1))
        free = (n for n in numbered if n not in names and n not in plain)
        names.append(name if plain.count(name) == 1 else next(free))
    return names


def _source(folder: Path, name: str, *, out: Path) -> Source:
    for place in (folder / "report", folder):
        if (place / REPORT_JSON).is_file():
            content = _checked(place / REPORT_JSON)
            seen = [r | {"path": _seen_from(out, place / r["path"])} for r in content["raw"]]
            teacher = _parents(place).get("artifact.teacher.hf")
            sha256 = _sha256(place / REPORT_JSON)
            return Source(name, content | {"raw": seen}, sha256, teacher)
    if not (folder / PROFILE).is_file():
        raise _nothing_here(folder)
    profile, sha256 = _read(folder / PROFILE), _sha256(folder / PROFILE)
    raw = {"path": _seen_from(out, folder / PROFILE), "sha256": sha256}
    with _ours(folder / PROFILE):
        content = of_profile(profile, title=name, raw=raw)
    return Source(name, content, sha256, _parents(folder).get("teacher"))


def _parents(folder: Path) -> Mapping[str, Any]:
    parents: Mapping[str, Any] = (
        read_manifest(folder)["parents"] if (folder / MANIFEST).is_file() else {}
    )
    return parents


def _checked(path: Path) -> dict[str, Any]:
    """A report.json as this version reads it, with all its keys."""
    from paretron_profiling.report.schema import Report

    content = _read(path)
    with _ours(path):
        return Report.of(content).to_json()


def _read(path: Path) -> dict[str, Any]:
    return read_object(path, code=Code.INPUT_CONFIG, max_bytes=_MAX_BYTES, max_nodes=_MAX_NODES)


def _seen_from(out: Path, path: Path) -> str:
    return Path(os.path.relpath(path.absolute(), out.absolute())).as_posix()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def _ours(*paths: Path) -> Iterator[None]:
    """INPUT_CONFIG for content of another shape than ours, wherever that shows."""
    try:
        yield
    except (
        ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError,
    ) as error:  # fmt: skip
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise ParetronError(
            Problem(
                Code.INPUT_CONFIG,
                f"not what this version of Paretron writes: {reason}",
                where=", ".join(map(str, paths)),
                fix="run `paretron run` or `paretron profile` again",
            )
        ) from error


def _nothing_here(folder: Path) -> ParetronError:
    return ParetronError(
        Problem(
            Code.INPUT_MISSING,
            "no report/report.json and no profile.json here",
            where=str(folder),
            fix="name the folder of a finished `paretron run`, or what `paretron profile` wrote",
        )
    )
