"""The report of a run: report.json, and one self-contained report.html.

The page needs no network and no server: plotly.js, styles and data are inside of it, and a content
security policy keeps it from asking for anything else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from paretron_profiling import report_tables as tables
from paretron_profiling import report_text as text
from paretron_profiling import report_view as view
from paretron_profiling.report_schema import Report
from paretron_profiling.schema import jsonable

TEMPLATES = "paretron_profiling.templates"


def write_report(report: Report | Mapping[str, Any], *, out: Path) -> None:
    """Write report.json and report.html into the folder `out`, which exists.

    pydantic.ValidationError when the content is not what report_schema says.
    """
    checked = report if isinstance(report, Report) else Report.of(report)
    content = json.dumps(checked.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
    (out / "report.json").write_text(content + "\n", encoding="utf-8")
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
        report=checked,
        created=view.moment(checked.created),
        verdict=text.verdict(checked),
        cards=view.cards(checked),
        headline_words=view.headline_words(checked),
        captions=text.captions(checked),
        doubts=text.doubts(checked),
        sizes=tables.sizes_table(checked),
        speed=tables.speed_table(checked),
        speedup=tables.speedup_table(checked),
        artifacts=tables.artifact_table(checked),
        curves=tables.curve_table(checked),
        has_speed=any(m.speed for m in checked.models),
        has_losses=any(m.loss.final is not None for m in checked.models),
        style=_resource("report.css"),
        script=_resource("report.js"),
        plotly=get_plotlyjs(),
        data=embed(view.payload(checked)),
    )


def embed(value: Any) -> str:
    """JSON that is safe inside a script element, whatever strings it holds."""
    content = json.dumps(jsonable(value), ensure_ascii=True, allow_nan=False)
    return content.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _resource(name: str) -> str:
    return files(TEMPLATES).joinpath(name).read_text(encoding="utf-8")
