"""The report: report.json, report.md, and one self-contained report.html.

The page needs no network and no server: plotly.js, styles and data are inside of it, and a content
security policy keeps it from asking for anything else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from paretron_profiling.report import details as more
from paretron_profiling.report import tables, text, view
from paretron_profiling.report.choice import (
    accuracies,
    frontier_words,
    headline_workload,
    throughputs,
)
from paretron_profiling.report.markdown import markdown
from paretron_profiling.report.schema import Report
from paretron_profiling.report.sources import Source, machine, merged, of_profile
from paretron_profiling.schema import OFFLINE, jsonable

__all__ = ["Source", "build_report", "embed", "merged", "of_profile", "write_report"]

TEMPLATES = "paretron_profiling.templates"
# One story each, in this order inside one function.
SCRIPTS = (
    "common", "frontier", "speed", "load", "roofline", "choose", "training", "importance", "main",
)  # fmt: skip
# A path beside the report; anything that a browser could read as an address is only text.
_PATH = re.compile(r"(\.\./)*[\w.-]+(/[\w.-]+)*")


def write_report(report: Report | Mapping[str, Any], *, out: Path) -> None:
    """Write report.json, report.md and report.html into the folder `out`, which exists.

    pydantic.ValidationError when the content is not what report_schema says.
    """
    checked = report if isinstance(report, Report) else Report.of(report)
    content = json.dumps(checked.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
    (out / "report.json").write_text(content + "\n", encoding="utf-8")
    (out / "report.md").write_text(markdown(checked), encoding="utf-8")
    (out / "report.html").write_text(build_report(checked), encoding="utf-8")


def build_report(report: Report | Mapping[str, Any]) -> str:
    """The page as one HTML text."""
    import jinja2
    from plotly.offline import get_plotlyjs

    checked = report if isinstance(report, Report) else Report.of(report)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(_resource("report.html.j2"))
    return template.render(
        **_content(checked),
        style=_resource("report.css"),
        script=script(),
        plotly=get_plotlyjs(),
        data=embed(view.payload(checked)),
    )


def _content(report: Report) -> dict[str, Any]:
    """What the template says, computed."""
    found = more.details(report)
    measures, work = accuracies(report), headline_workload(report)
    speeds = throughputs(report, work) if work else {}
    every = [s for m in report.models for s in m.speed]
    content = {
        "report": report,
        "created": view.moment(report.created),
        "verdict": text.verdict(report),
        "verdicts": view.VERDICTS,
        "goals_words": more.goals_words(report),
        "cards": view.cards(report),
        "headline_words": view.headline_words(report),
        "conditions": text.conditions(report),
        "doubts": text.doubts(report),
        "frontier": frontier_words(speeds, measures[0], report=report) if measures else (),
        "sizes": tables.sizes_table(report),
        "losses": tables.losses_table(report),
        "speed": tables.speed_table(report),
        "speedup": tables.speedup_table(report),
        "artifacts": tables.artifact_table(report),
        "curves": tables.curve_table(report),
        "details": found,
        "overheads": more.overheads(report),
        "cost_words": more.cost_words(report),
        "family_words": more.family_words(report),
        "raw": [_linked(r.model_dump()) for r in report.raw],
        "has_speed": bool(every),
        "has_accuracy": bool(measures),
        "has_sizes": any(m.params is not None or m.loss.final is not None for m in report.models),
        "has_loads": view.has_loads(report),
        "machines": len({machine(run.hardware) for run in report.runs}),
        "has_loops": any(s.mode != OFFLINE for s in every),
    }
    return content | {"parts": list(_parts(content))}


def _parts(content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The headings of the page that can be jumped to."""
    report, found, speed = content["report"], content["details"], content["has_speed"]
    parts = (
        ("goals", "Goals", found["goals"].rows),
        ("choosing", "Which one to take", speed),
        ("speed", "Accuracy and speed" if content["has_accuracy"] else "Speed", speed),
        ("load", "Load", speed and (content["has_loads"] or content["has_loops"])),
        ("roofline", "Roofline", speed and found["roofline"].rows),
        ("h-memory", "Memory", speed and found["memory"].rows),
        ("sizes", "Sizes and losses", content["has_sizes"]),
        ("training", "Training", report.curves),
        ("h-importance", "Importance", report.importance),
        ("cost", "Cost", found["cost"].rows or content["family_words"]),
        ("runs", "Runs", found["runs"].rows),
        ("how", "How it was measured", True),
    )
    return ((name, title) for name, title, there in parts if there)


def _linked(raw: dict[str, Any]) -> dict[str, Any]:
    return raw | {"link": raw["path"] if _PATH.fullmatch(raw["path"]) else None}


def script() -> str:
    """The page's own script, its parts inside one function."""
    parts = "\n".join(_resource(f"{name}.js") for name in SCRIPTS)
    return f'"use strict";\n(() => {{\n{parts}}})();\n'


def embed(value: Any) -> str:
    """JSON that is safe inside a script element, whatever strings it holds."""
    content = json.dumps(jsonable(value), ensure_ascii=True, allow_nan=False)
    return content.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _resource(name: str) -> str:
    return files(TEMPLATES).joinpath(name).read_text(encoding="utf-8")
