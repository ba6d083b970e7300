"""Reports out of other things: a profile alone, and several runs merged into one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from paretron_profiling.models import TEACHER
from paretron_profiling.report.choice import label
from paretron_profiling.result import ProfileResult

# What makes two machines the same for a comparison; the rest is the date, the load and the like.
_MACHINE = ("cpu", "cores", "threads", "memory_bytes", "gpu", "gpus")


@dataclass(frozen=True)
class Source:
    """One run of several: what it is called, its report's content, its identity, its teacher's."""

    name: str
    content: Mapping[str, Any]
    sha256: str
    teacher_sha256: str | None


def of_profile(profile: Mapping[str, Any], *, title: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a report on what `paretron profile` measured; it knows no losses.

    ValueError, TypeError or KeyError for content that is no profile.v1.
    """
    result = ProfileResult.from_json(profile)
    return {
        "schema": 1,
        "title": title,
        "created": str(result.hardware.get("date", "")) or _now(),
        "models": [
            {
                "name": name,
                "kind": TEACHER if name == TEACHER else "profiled",
                "speed": [m.summary() for m in found],
            }
            for name, found in sorted(result.measurements.items(), key=_teacher_first)
        ],
        "speedup": [s.to_json() for s in result.speedups],
        "roofline": profile.get("roofline"),
        "device": profile.get("device"),
        "memory": profile.get("memory", []),
        "hardware": result.hardware,
        "engines": result.engines,
        "method": result.method,
        "incomplete": result.incomplete,
        "captions": ["Speed alone was measured here: this report knows of no losses."],
        "raw": [raw],
    }


def _teacher_first(item: tuple[str, object]) -> bool:
    return item[0] != TEACHER


def merged(sources: Sequence[Source]) -> dict[str, Any]:
    """The content of one report over several runs, its models named RUN/MODEL.

    Every student is compared with the teacher of its own run, in the pairs that were measured
    there; nothing is paired across runs.
    """
    contents = [s.content for s in sources]
    return {
        "schema": 1,
        "title": " and ".join(s.name for s in sources),
        "stamp": next((c["stamp"] for c in contents if c.get("stamp")), None),
        "created": _now(),
        "models": [m for s in sources for m in _models(s)],
        **{
            part: [_renamed(row, s.name) for s in sources for row in s.content.get(part) or ()]
            for part in ("speedup", "curves", "goals", "memory")
        },
        "roofline": _roofline(sources),
        "versions": _common([c.get("versions") or {} for c in contents]),
        "method": _common([c.get("method") or {} for c in contents]),
        "hardware": _common([c.get("hardware") or {} for c in contents]),
        "engines": _common([c.get("engines") or {} for c in contents]),
        "incomplete": "; ".join(
            f"{s.name}: {s.content['incomplete']}" for s in sources if s.content.get("incomplete")
        )
        or None,
        "captions": [
            *apart(sources),
            *(f"{s.name}: {c}" for s in sources for c in s.content.get("captions") or ()),
        ],
        "raw": [
            {**r, "run": _within(s.name, r.get("run"))}
            for s in sources
            for r in s.content.get("raw") or ()
        ],
        "runs": [run for s in sources for run in _runs(s)],
    }


def apart(sources: Sequence[Source]) -> Iterator[str]:
    """What keeps the runs from being compared as one: teachers, machines, engines."""
    yield (
        "Ratios are of a student over the teacher of its own run, paired there. Figures of "
        "different runs were measured at different times and are not paired."
    )
    teachers = {s.teacher_sha256 for s in sources}
    if None in teachers:
        unknown = ", ".join(s.name for s in sources if s.teacher_sha256 is None)
        yield f"Whether the teachers are the same is not known: no checksum of {unknown}'s."
    elif len(teachers) == 1:
        yield f"All runs have the same teacher (sha256 {str(sources[0].teacher_sha256)[:12]})."
    else:
        named = ", ".join(f"{s.name} {str(s.teacher_sha256)[:12]}" for s in sources)
        yield (
            f"The runs' teachers differ (sha256 {named}): what a student is above its teacher is "
            "not comparable between runs, its loss is, on the same text."
        )
    machines = [machine(s.content.get("hardware") or {}) for s in sources]
    if len(set(machines)) > 1:
        named = "; ".join(f"{s.name}: {m}" for s, m in zip(sources, machines, strict=True))
        yield f"The runs were measured on different machines ({named}): speeds do not compare."
    for engine in dict.fromkeys(e for s in sources for e in s.content.get("engines") or {}):
        by_run = {s.name: s.content["engines"].get(engine) for s in sources}
        known = {name: about for name, about in by_run.items() if about}
        if len({str(sorted(about.items(), key=str)) for about in known.values()}) > 1:
            yield f"{engine} was not the same, or not set up alike, in {', '.join(known)}."


def _models(source: Source) -> Iterator[dict[str, Any]]:
    teacher = next((m["name"] for m in source.content["models"] if m["kind"] == TEACHER), None)
    for model in source.content["models"]:
        # One that is merged already says whose teacher is whose.
        own = model.get("teacher") if model.get("run") else teacher
        of = None if own in (None, model["name"]) else _name(source.name, str(own))
        name, run = _name(source.name, model["name"]), _within(source.name, model.get("run"))
        yield {**model, "name": name, "run": run, "teacher": of}


def _name(run: str, model: str) -> str:
    return f"{run}/{model}"


def _within(source: str, run: str | None) -> str:
    """A run of a source that is merged already, or the source itself."""
    return source if run is None else _name(source, run)


def _renamed(row: Mapping[str, Any], run: str) -> dict[str, Any]:
    return {**row, "model": _name(run, row["model"])}


def _roofline(sources: Sequence[Source]) -> dict[str, Any] | None:
    known = [(s.name, found) for s in sources if (found := s.content.get("roofline"))]
    if not known:
        return None
    return {
        "rows": [_renamed(row, name) for name, found in known for row in found["rows"]],
        "speedup": [_renamed(row, name) for name, found in known for row in found["speedup"]],
        "overheads": [
            {**row, "engine": f"{row['engine']} in {name}"}
            for name, found in known
            for row in found.get("overheads") or ()
        ],
        "notes": [f"{name}: {note}" for name, found in known for note in found["notes"]],
    }


def _runs(source: Source) -> Iterator[dict[str, Any]]:
    content = source.content
    if content.get("runs"):
        yield from ({**run, "name": _name(source.name, run["name"])} for run in content["runs"])
        return
    yield {
        "name": source.name,
        "title": label(content["title"]),
        "created": content["created"],
        "teacher_sha256": source.teacher_sha256,
        "hardware": content.get("hardware") or {},
        "engines": content.get("engines") or {},
        "seed": content.get("seed"),
    }


def machine(hardware: Mapping[str, Any]) -> str:
    """What makes a machine another one, in words."""
    return ", ".join(f"{key} {hardware[key]}" for key in _MACHINE if key in hardware) or "unknown"


def _common(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all runs agree on."""
    first = parts[0] if parts else {}
    return {k: v for k, v in first.items() if all(p.get(k) == v for p in parts)}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
