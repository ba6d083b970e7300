"""From the runs of a tool to profile.v1: measurements by model, ratios, and what they rest on.

A measurement of raw times is what the profiler itself would make of them. Where a file states only
figures, a measurement is the median of its files' figures; percentiles of several runs cannot be
pooled then and are left out. A ratio is the median over rounds where the models were measured in
turns, as by us; of files from elsewhere it is the ratio of the medians, and has no interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from paretron_profiling.bench.reading import Reading
from paretron_profiling.compare import MAIN, PARTS, SAME_BATCH, Ratio, Speedup
from paretron_profiling.models import TEACHER
from paretron_profiling.result import ProfileResult
from paretron_profiling.schema import (
    BUNDLED,
    FIGURES,
    LATENCIES,
    MIN_SECONDS,
    OPEN,
    SHORT,
    Measurement,
    Workload,
    flags_of,
)
from paretron_profiling.stats import Interval, median_interval, relative_spread

# The usual gap is about the time of a token; far below it, several tokens came at once.
BUNDLE = 0.1

# The runs that one result file tells of.
File = Sequence[Reading]


def profile_of(
    files: Mapping[str, Sequence[File]],
    *,
    rounds: bool,
    hardware: Mapping[str, Any],
    method: Mapping[str, Any],
    about: Mapping[str, str] | None = None,
    incomplete: str | None = None,
) -> ProfileResult:
    """The profile of models by name, each with its result files.

    `rounds` says that the models were measured in turns: the k-th files of a workload then pair.
    `about` is known of what ran besides what the files say of it.
    """
    by_work = {name: _by_workload(found) for name, found in files.items()}
    measured = {
        name: {work: _measurement(work, found) for work, found in works.items()}
        for name, works in by_work.items()
    }
    readings = [r for found in files.values() for file in found for r in file]
    notes = list(dict.fromkeys(note for r in readings for note in r.notes))
    warmups = [r.warmup for r in readings]
    unsaid = None in warmups
    if unsaid:
        notes.append("the files do not tell whether there was a warm-up")
    return ProfileResult(
        {name: tuple(works.values()) for name, works in measured.items()},
        tuple(_ratios(by_work, measured, rounds=rounds)),
        hardware,
        {r.work.engine: {**(about or {}), **r.about} for r in readings},
        {
            "repeats": min((m.repeats for w in measured.values() for m in w.values()), default=0),
            "warmup": None if unsaid else min(w for w in warmups if w is not None),
            "notes": notes,
            **method,
        },
        incomplete,
    )


def _by_workload(files: Sequence[File]) -> dict[Workload, list[File]]:
    found: dict[Workload, list[File]] = {}
    for file in files:
        for work in dict.fromkeys(r.work for r in file):
            found.setdefault(work, []).append([r for r in file if r.work == work])
    return found


def _measurement(work: Workload, files: Sequence[File]) -> Measurement:
    readings = [r for file in files for r in file]
    # A warm-up that nobody spoke of is no reason for a flag, nor for leaving one out: a note tells.
    warmup = min((1 if r.warmup is None else r.warmup for r in readings), default=0)
    flags = {flag for r in readings for flag in (*r.flags, *_bundled(r))}
    samples = [r.sample for r in readings if r.sample is not None]
    if len(samples) == len(readings):
        return Measurement.of(work, samples=samples, warmup=warmup, doubts=tuple(flags))
    stated = {name: [r.figures[name] for r in readings if name in r.figures] for name in FIGURES}
    spread = relative_spread(stated["e2e_ms" if work.mode == OPEN else "output_tok_s"])
    seconds, failed = sum(r.seconds for r in readings), sum(r.failed for r in readings)
    seen = {*flags, SHORT} if seconds < MIN_SECONDS else flags
    around = {name: median_interval(values) for name, values in stated.items() if values}
    figures: dict[str, Any] = {n: median(v) if v else None for n, v in stated.items()}
    return Measurement(
        **asdict(work),
        **figures,
        repeats=len(readings),
        spread=spread,
        ranges={name: (min(values), max(values)) for name, values in stated.items() if values},
        flags=flags_of(
            repeats=len(readings), warmup=warmup, spread=spread, failed=failed, seen=seen
        ),
        failed=failed,
        requests=sum(r.requests for r in readings),
        measured_s=seconds,
        intervals={name: (i.low, i.high) for name, i in around.items()},
        coverage=min((i.coverage for i in around.values()), default=None),
        percentiles=readings[0].percentiles if len(readings) == 1 else {},
    )


def _bundled(reading: Reading) -> tuple[str, ...]:
    """A client that falls behind reads many chunks at once, and takes them for instant."""
    gap, token = (reading.figures.get(name) for name in ("itl_ms", "tpot_ms"))
    late = gap is not None and token is not None and gap <= BUNDLE * token
    return (BUNDLED,) if late else ()


def _ratios(
    files: Mapping[str, Mapping[Workload, Sequence[File]]],
    measured: Mapping[str, Mapping[Workload, Measurement]],
    *,
    rounds: bool,
) -> list[Speedup]:
    """Every student against its teacher, under the same load."""
    found = []
    for name, works in files.items():
        for work, own in works.items() if name != TEACHER else ():
            base = files.get(TEACHER, {}).get(work)
            if base is None:
                continue
            parts = {part: _ratio(part, own, base, rounds=rounds) for part in PARTS[work.mode]}
            main = _ratio(MAIN[work.mode], own, base, rounds=rounds)
            if main is None:
                continue
            pairs, interval = main
            flags = (*measured[TEACHER][work].flags, *measured[name][work].flags)
            found.append(
                Speedup(
                    model=name,
                    engine=work.engine,
                    rule=SAME_BATCH,
                    ratio=interval.median,
                    interval=(interval.low, interval.high),
                    coverage=interval.coverage,
                    pairs=pairs,
                    input_len=work.input_len,
                    output_len=work.output_len,
                    mode=work.mode,
                    load=work.load,
                    teacher_load=work.load,
                    memory_bytes=None,
                    limit=None,
                    flags=tuple(dict.fromkeys(flags)),
                    figure=MAIN[work.mode],
                    parts={part: Ratio.of(value[1]) for part, value in parts.items() if value},
                )
            )
    return found


def _ratio(
    name: str, own: Sequence[File], base: Sequence[File], *, rounds: bool
) -> tuple[int, Interval] | None:
    """How many pairs there are, and the median ratio: above 1 where the student is better.

    Without rounds there are none: the interval is the ratio itself and promises nothing.
    """
    mine, theirs = _figures(name, own), _figures(name, base)
    up, down = (theirs, mine) if name in LATENCIES else (mine, theirs)
    if rounds:
        ratios = [a / b for a, b in zip(up, down, strict=False) if a and b]
        return (len(ratios), median_interval(ratios)) if ratios else None
    whole = [[v for v in side if v] for side in (up, down)]
    if not all(whole):
        return None
    ratio = median(whole[0]) / median(whole[1])
    return 0, Interval(ratio, ratio, ratio, 0.0)


def _figures(name: str, files: Sequence[File]) -> list[float | None]:
    """The figure of each file: the median over its runs."""
    found = [[r.figures[name] for r in file if name in r.figures] for file in files]
    return [median(values) if values else None for values in found]
