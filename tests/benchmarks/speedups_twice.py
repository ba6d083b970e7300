"""Whether speedups that are measured twice agree within the interval that each states: JSON lines.

PYTHONPATH=tests python -m benchmarks.speedups_twice teacher=DIR,DIR width=DIR,DIR depth=DIR,DIR \\
    --engine ortgenai --engine vllm=PYTHON --out DIR [--repeats 7] [--in-turn]

Each run is one command of `paretron profile` over all engines. Of every ratio of the first run it
is said whether the second run's median lies within the first's interval and the other way round,
and whether the intervals overlap. Seven pairs state 98 % (their whole range); two honest intervals
of 98 % hold each other's *median* less often than that, since the other median moves too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paretron_profiling.compare import SAME_LATENCY, Speedup
from paretron_profiling.result import ProfileResult

Key = tuple[str, str, str, str, float, str]


def main() -> None:
    """Profile twice and compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+", metavar="NAME=DIR[,DIR]")
    parser.add_argument("--engine", action="append", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--in-turn", action="store_true")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--lengths", type=int, nargs=2, default=[128, 32])
    asked = parser.parse_args()
    runs = [profiled(asked, asked.out / f"run{k}") for k in (1, 2)]
    lines = list(compared(*runs))
    for line in lines:
        print(json.dumps(line))
    counted = ("first_holds_second", "second_holds_first", "overlap")
    summary = {"ratios": len(lines)} | {k: sum(x[k] for x in lines) for k in counted}
    on = {"hardware": dict(runs[0].hardware), "engines": dict(runs[0].engines)}
    print(json.dumps(summary | on))


def profiled(asked: argparse.Namespace, out: Path) -> ProfileResult:
    """One command over all engines; a result that is there already is taken as it is."""
    if not (out / "profile.json").is_file():
        inputs, outputs = asked.lengths
        command = [
            sys.executable, "-m", "paretron", "profile", *asked.models, "--out", str(out),
            *(word for engine in asked.engine for word in ("--engine", engine)),
            *(word for batch in asked.batch for word in ("--batch", str(batch))),
            "--input-len", str(inputs), "--output-len", str(outputs),
            "--repeats", str(asked.repeats), *(["--in-turn"] if asked.in_turn else []),
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return ProfileResult.from_json(json.loads((out / "profile.json").read_text()))


def compared(first: ProfileResult, second: ProfileResult) -> Iterator[dict[str, Any]]:
    """A line for each ratio of both runs."""
    again = dict(_ratios(second))
    for key, (ratio, (low, high), coverage, flags) in _ratios(first):
        if key not in again:
            continue
        other, (other_low, other_high), _, other_flags = again[key]
        model, engine, rule, mode, load, figure = key
        yield {
            "model": model, "engine": engine, "rule": rule, "mode": mode, "load": load,
            "figure": figure, "coverage": coverage,
            "first": {"ratio": ratio, "low": low, "high": high, "flags": flags},
            "second": {"ratio": other, "low": other_low, "high": other_high, "flags": other_flags},
            "first_holds_second": low <= other <= high,
            "second_holds_first": other_low <= ratio <= other_high,
            "overlap": max(low, other_low) <= min(high, other_high),
        }  # fmt: skip


Found = tuple[float, tuple[float, float], float, tuple[str, ...]]


def _ratios(result: ProfileResult) -> Iterator[tuple[Key, Found]]:
    """Every ratio: what a comparison is of, and its parts; none of the same runs twice."""
    for s in result.speedups:
        if s.rule == SAME_LATENCY and s.load == s.teacher_load:
            continue
        yield _key(s, s.figure), (s.ratio, s.interval, s.coverage, s.flags)
        for figure, part in s.parts.items():
            yield _key(s, figure), (part.ratio, part.interval, s.coverage, s.flags)


def _key(speedup: Speedup, figure: str) -> Key:
    return (
        speedup.model, speedup.engine, speedup.rule, speedup.mode, speedup.load, figure,
    )  # fmt: skip


if __name__ == "__main__":
    main()
