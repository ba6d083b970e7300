"""Fuzzing for as long as asked: PYTHONPATH=tests python -m fuzz.long --minutes 60 --out fuzz.json.

The summary counts the cases of each outcome and is written anew every few seconds. A failure names
its target and seed: --target model --seed 1234 --cases 1 runs that case again. Exit code 1 when
there was one.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from fuzz.bases import make_bases
from fuzz.targets import (
    MAX_GROWTH_KB,
    Case,
    model_case,
    recipe_case,
    run_case,
)

SAVE_EVERY_S = 5.0
MOST_FAILURES = 200
MAX_PROCESS_BYTES = 16 << 30  # a bomb ends in MemoryError, not in the machine's


def main() -> int:
    """Run cases until the time or their number is up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--cases", type=int, default=sys.maxsize, help="stop after so many")
    parser.add_argument("--target", choices=("model", "recipe", "both"), default="both")
    parser.add_argument("--seed", type=int, default=None, help="of the first case")
    parser.add_argument("--out", type=Path, default=None, help="where the summary goes (JSON)")
    asked = parser.parse_args()
    seed = time.time_ns() if asked.seed is None else asked.seed
    resource.setrlimit(resource.RLIMIT_AS, (MAX_PROCESS_BYTES, MAX_PROCESS_BYTES))
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory(prefix="paretron-fuzz-") as name:
        scratch = Path(name)
        cases = {
            "model": model_case(make_bases(scratch / "bases")),
            "recipe": recipe_case(),
        }
        chosen = cases if asked.target == "both" else {asked.target: cases[asked.target]}
        summary = run(chosen, scratch, seed=seed, asked=asked)
    print(json.dumps(summary, indent=2))
    return 1 if summary["failures"] else 0


def run(
    cases: dict[str, Case], scratch: Path, *, seed: int, asked: argparse.Namespace
) -> dict[str, Any]:
    """The summary of all cases; each target's turn comes by the case's number."""
    outcomes: Counter[str] = Counter()
    failures: list[dict[str, Any]] = []
    slowest, largest = 0.0, 0
    started = saved = time.monotonic()
    number = 0
    while number < asked.cases and time.monotonic() - started < asked.minutes * 60:
        target = list(cases)[number % len(cases)]
        result = run_case(cases[target], Random(seed + number), scratch)
        failure = result.failure
        if not failure and result.growth_kb > MAX_GROWTH_KB and result.growth_kb > largest:
            failure = f"{result.growth_kb} kB more memory"
        outcomes[f"{target}: {'FAILED' if failure else result.outcome}"] += 1
        if failure and len(failures) < MOST_FAILURES:
            failures.append({"target": target, "seed": seed + number, "failure": failure})
        slowest, largest = max(slowest, result.seconds), max(largest, result.growth_kb)
        number += 1
        last = number == asked.cases
        if last or time.monotonic() - saved > SAVE_EVERY_S:
            saved = time.monotonic()
            _save(asked.out, _summary(seed, number, started, outcomes, slowest, largest, failures))
    done = _summary(seed, number, started, outcomes, slowest, largest, failures)
    _save(asked.out, done)
    return done


def _summary(
    seed: int,
    number: int,
    started: float,
    outcomes: Counter[str],
    slowest: float,
    largest_kb: int,
    failures: list[dict[str, Any]],
) -> dict[str, Any]:
    return {
        "seed": seed,
        "cases": number,
        "seconds": round(time.monotonic() - started, 1),
        "outcomes": dict(sorted(outcomes.items())),
        "slowest_case_cpu_s": round(slowest, 3),
        "largest_growth_mb": round(largest_kb / 1000, 1),
        "failures": failures,
    }


def _save(path: Path | None, summary: dict[str, Any]) -> None:
    if path is None:
        return
    half = path.with_name(path.name + ".half")
    half.write_text(json.dumps(summary, indent=2) + "\n", "utf-8")
    half.replace(path)


if __name__ == "__main__":
    sys.exit(main())
