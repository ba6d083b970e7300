"""report.md: the report's sentences and tables as Markdown, whatever strings are in them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from paretron_profiling.report import tables, text
from paretron_profiling.report.choice import (
    accuracies,
    frontier_words,
    headline_workload,
    throughputs,
    workload_words,
)
from paretron_profiling.report.details import (
    cost_words,
    details,
    family_words,
    goals_words,
    overheads,
)
from paretron_profiling.report.schema import Report
from paretron_profiling.report.tables import Table

# What Markdown, or HTML within it, could read as more than text.
_SPECIAL = re.compile(r"([\\`*_{}\[\]#!|~$])")
_BEGINNING = re.compile(r"^([-+=]|\d+[.)])")  # of a list, or a line under a heading
_ADDRESS = re.compile(r"(?i)(https?|ftp|mailto|www)([:.])")  # which would become a link by itself
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}


def escaped(said: str) -> str:
    """A text as Markdown that shows it: on one line, nothing in it read as markup."""
    one_line = " ".join(said.split())
    plain = re.sub("[&<>]", lambda found: _ENTITIES[found.group()], one_line)
    plain = _ADDRESS.sub(r"\1&#8203;\2", _SPECIAL.sub(r"\\\1", plain))
    return _BEGINNING.sub(r"\\\1", plain)


def markdown(report: Report) -> str:
    """The whole report as Markdown."""
    return "\n".join(_lines(report)).rstrip() + "\n"


def _lines(report: Report) -> Iterator[str]:
    found = details(report)
    yield f"# {escaped(text.verdict(report))}"
    yield ""
    if report.stamp:
        yield f"**{escaped(report.stamp)}**: random weights; these numbers mean nothing."
        yield ""
    if report.incomplete:
        yield f"**INCOMPLETE**: profiling stopped early: {escaped(report.incomplete)}"
        yield ""
    yield f"Paretron report, {escaped(report.title)}, {escaped(report.created)}."
    yield ""
    for headline in text.headlines(report):
        note = f" ({escaped(headline.speed_note)})" if headline.speed_note else ""
        yield f"- {escaped(headline.sentence)}{note}"
    yield ""
    if found["goals"].rows:
        yield from _section(f"Goals: {goals_words(report)}", found["goals"])
    yield from _frontier(report)
    if any(m.speed for m in report.models):
        yield from _section("Speed", tables.speed_table(report))
    if report.speedup:
        yield from _section("How many times faster", tables.speedup_table(report))
    for name, title in (
        ("latency", "Latency over load"),
        ("power", "Power and clocks"),
        ("roofline", "Roofline"),
        ("predicted", "Speed-up by the bounds"),
        ("memory", "Memory"),
    ):
        if found[name].rows:
            yield from _section(title, found[name])
    if beyond := overheads(report):
        yield from (f"- {escaped(line)}" for line in beyond)
        yield ""
    yield from _section("Sizes", tables.sizes_table(report))
    if (losses := tables.losses_table(report)).rows:
        yield from _section("Losses", losses)
    if found["tasks"].rows:
        yield from _section("Tasks", found["tasks"])
    if report.curves:
        yield from _section("Training", tables.curve_table(report))
    if found["layers"].rows:
        yield from _section("What mattered in the teacher", found["layers"])
    yield from _cost(report)
    artifacts = tables.artifact_table(report)
    if artifacts.rows:
        yield from _section("What was written", artifacts)
    for name, title in (("runs", "The runs"), ("across", "Across runs")):
        if found[name].rows:
            yield from _section(title, found[name])
    yield from _how(report)


def _frontier(report: Report) -> Iterator[str]:
    work = headline_workload(report)
    if work is None:
        return
    speeds = throughputs(report, work)
    said = [(a, frontier_words(speeds, a, report=report)) for a in accuracies(report)]
    known = [(a, lines) for a, lines in said if lines]
    if not known:
        return
    yield f"## Accuracy against throughput ({escaped(workload_words(work))})"
    yield ""
    for accuracy, lines in known:
        yield f"- By {escaped(accuracy.label)}: {escaped(' '.join(lines))}"
    yield ""


def _cost(report: Report) -> Iterator[str]:
    found = details(report)
    if not (found["cost"].rows or found["family"].rows):
        return
    yield f"## Cost: {escaped(cost_words(report))}"
    yield ""
    if words := family_words(report):
        yield escaped(words)
        yield ""
    for name in ("family", "cost"):
        if found[name].rows:
            yield from _table(found[name])


def _how(report: Report) -> Iterator[str]:
    yield "## How it was measured"
    yield ""
    if doubtful := text.doubts(report):
        yield "Doubtful measurements:"
        yield ""
        yield from (f"- {escaped(d)}" for d in doubtful)
        yield ""
    for title, lines in text.conditions(report):
        yield f"### {escaped(title)}"
        yield ""
        yield from (f"- {escaped(line)}" for line in lines)
        yield ""
    if (settings := details(report)["settings"]).rows:
        yield from _table(settings)
    for raw in report.raw:
        of = f" of {raw.run}" if raw.run else ""
        known = f", sha256 {raw.sha256}" if raw.sha256 else ""
        yield escaped(f"Raw samples of every repeat{of}: {raw.path}{known}")
        yield ""


def _section(title: str, table: Table) -> Iterator[str]:
    yield f"## {escaped(title)}"
    yield ""
    yield from _table(table)


def _table(table: Table) -> Iterator[str]:
    yield escaped(table.caption) + ":"
    yield ""
    yield _row(table.heads)
    yield _row(tuple("---" for _ in table.heads), raw=True)
    yield from (_row(row) for row in table.rows)
    yield ""


def _row(cells: tuple[str, ...], *, raw: bool = False) -> str:
    return "| " + " | ".join(c if raw else escaped(c) or " " for c in cells) + " |"
