"""Exports of a large checkpoint beside a copy of its files: time and peak memory, as JSON.

python tests/benchmarks/export_streaming.py --folder /data/bench --scale 1 --repeats 1

Builds a checkpoint of Llama-3.1-8B's shape in bfloat16 (16 GB at scale 1), or takes the one that is
in the folder, and exports it with `hf` and with `trtllm_engine` for two devices, each in a process
of its own. The copy is `cp` and a sync. The input leaves the page cache before each, the order
alternates, and what was made is removed at once: three times the checkpoint's size is needed.

`writing` ends when an export says that it compares; what comes behind are the gates that are left
then, and publishing. Peaks are of the process, read from /proc while it runs: VmHWM counts mapped
files, RssAnon does not.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.surgery import build, measured, uncache

EXPORTS: Mapping[str, Mapping[str, Any]] = {
    "hf": {"to": "hf"},
    "trtllm_engine": {"to": "trtllm_engine", "tensor_parallel": 2},
}


def export(name: str, model: Path, out: Path) -> None:
    """One export in this process; its last line of output says when it was done with what."""
    from paretron.artifacts.manifest import Provenance
    from paretron.plugins import EXPORTERS, find_plugin
    from paretron.recipe import Export

    start, writing = time.perf_counter(), 0.0

    def on_event(kind: str, fields: Mapping[str, object]) -> None:
        nonlocal writing
        if kind == "note" and str(fields["message"]).startswith("comparing"):
            writing = time.perf_counter() - start

    section = Export.model_validate(EXPORTS[name])
    exporter = find_plugin(EXPORTERS, section.to, where="--export")
    report = exporter.export(
        model,
        export=section,
        out=out,
        provenance=Provenance(kind="export"),
        on_event=on_event,
    )
    seconds = time.perf_counter() - start
    levels = sorted({check.level for check in report.checks})
    said = {"writing": round(writing, 2), "behind": round(seconds - writing, 2), "levels": levels}
    print(json.dumps(said))


def run(name: str, folder: Path) -> dict[str, Any]:
    """One copy or export in a process of its own, and what it took."""
    model, out, log = folder / "model", folder / "out", folder / "log.txt"
    uncache(model)
    copy: list[str | Path] = [
        "sh",
        "-c",
        f'cp -r --reflink=never "{model}" "{out}" && sync -f "{out}"',
    ]
    child: list[str | Path] = [sys.executable, __file__, "--folder", folder, "--export", name]
    try:
        found: dict[str, Any] = measured(
            copy if name == "copy" else child, log=log, cache=folder / "cache"
        )
    finally:
        nbytes = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
        shutil.rmtree(out, ignore_errors=True)
    if name != "copy":
        found |= json.loads(log.read_text().splitlines()[-1])
    return found | {"written_gb": round(nbytes / 1e9, 3)}


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--scale", type=float, default=0.125, help="1 is 8B; layers and vocabulary")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--export", choices=list(EXPORTS), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.export:
        export(asked.export, asked.folder / "model", asked.folder / "out")
        return
    asked.folder.mkdir(parents=True, exist_ok=True)
    build(asked.folder, asked.scale)
    names = ("copy", *EXPORTS)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn in range(asked.repeats):
        for name in names[:: -1 if turn % 2 else 1]:
            runs[name].append(run(name, asked.folder))
    seconds = {k: statistics.median(r["seconds"] for r in v) for k, v in runs.items()}
    result = {
        "scale": asked.scale,
        "repeats": asked.repeats,
        "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
        "runs": runs,
        "median_seconds": seconds,
        "time_ratio": {n: round(seconds[n] / seconds["copy"], 3) for n in EXPORTS},
        "writing_ratio": {
            n: round(statistics.median(r["writing"] for r in runs[n]) / seconds["copy"], 3)
            for n in EXPORTS
        },
        "peak_mb": {n: max(r["peak_mb"] for r in runs[n]) for n in EXPORTS},
        "peak_anonymous_mb": {n: max(r["peak_anonymous_mb"] for r in runs[n]) for n in EXPORTS},
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
