"""More tables of a report: goals, tasks, load, roofline, memory, cost, importance, runs."""

from __future__ import annotations

from collections.abc import Iterator

from paretron_profiling import figures
from paretron_profiling.models import TEACHER
from paretron_profiling.report.choice import (
    label,
    throughputs,
    workload,
    workload_words,
    workloads,
)
from paretron_profiling.report.parts import Peak, Task
from paretron_profiling.report.schema import Model, Report, Speed
from paretron_profiling.report.tables import Table
from paretron_profiling.schema import MODES, OFFLINE

PHASES = {"prefill": "prefill", "decode": "decode step"}


def details(report: Report) -> dict[str, Table]:
    """Every table by its name; one without rows has nothing to say."""
    return {
        "goals": goals_table(report),
        "tasks": tasks_table(report),
        "latency": latency_table(report),
        "power": power_table(report),
        "roofline": roofline_table(report),
        "predicted": predicted_table(report),
        "memory": memory_table(report),
        "cost": cost_table(report),
        "family": family_table(report),
        "layers": layers_table(report),
        "settings": settings_table(report),
        "runs": runs_table(report),
        "across": across_table(report),
    }


def goals_table(report: Report) -> Table:
    """Every goal with what was measured and the verdict."""
    rows = tuple(
        (
            label(g.model), g.figure, g.text.partition("; ")[0], figures.plain(g.value),
            _range(g.low, g.high), g.verdict, g.text.partition("; ")[2] or figures.ABSENT,
        )
        for g in report.goals
    )  # fmt: skip
    heads = ("Model", "Figure", "Goal", "Measured", "Interval", "Verdict", "How it was judged")
    return Table("Goals of the recipe", heads, rows)


def goals_words(report: Report) -> str:
    """ "2 of 4 goals met, 1 missed, 1 undecided"; empty where there is no goal."""
    if not report.goals:
        return ""
    counts = {v: sum(g.verdict == v for g in report.goals) for v in ("missed", "undecided")}
    counts["not measured"] = sum(g.verdict == "absent" for g in report.goals)
    met = sum(g.verdict == "met" for g in report.goals)
    rest = [f"{n} {verdict}" for verdict, n in counts.items() if n]
    return ", ".join((f"{met} of {len(report.goals)} goals met", *rest))


def tasks_table(report: Report) -> Table:
    """Every task of every model, with its interval and its paired distance from the teacher."""
    rows = tuple(
        (
            label(m.name), name, task.metric,
            figures.ABSENT if task.few_shot is None else str(task.few_shot),
            _task_value(task.value, task), _range(task.low, task.high, 4),
            figures.ABSENT if task.samples is None else f"{task.samples:,}",
            _difference(m, f"task.{name}"),
        )
        for m in report.models
        for name, task in m.tasks.items()
    ) + tuple(
        (label(m.name), name, f"left out: {why}", *[figures.ABSENT] * 5)
        for m in report.models
        for name, why in m.left_out.items()
    )  # fmt: skip
    heads = (
        "Model", "Task", "Metric", "Few-shot", "Value", "Interval", "Documents",
        "Against teacher, paired",
    )  # fmt: skip
    return Table("Tasks (intervals of 95 %)", heads, rows)


def _task_value(value: float | None, task: Task) -> str:
    return figures.plain(value, digits=4) + ("" if task.higher_is_better else " (lower is better)")


def _difference(model: Model, key: str) -> str:
    found = model.differences.get(key)
    if found is None or found.value is None:
        return figures.ABSENT
    return figures.signed(found.value) + figures.within(found.low, found.high)


def latency_table(report: Report) -> Table:
    """Latencies over load: medians, the 99th percentiles, goodput, failures."""
    rows = tuple(
        (
            label(m.name), s.engine, figures.load(s.mode, s.load),
            f"{s.input_len} + {s.output_len}", _two(s, "ttft_ms"), _two(s, "tpot_ms"),
            _two(s, "itl_ms"), _two(s, "e2e_ms"), figures.plain(s.request_s),
            figures.plain(s.goodput_s), figures.percent(s.good_share),
            f"{s.failed} of {s.requests}",
        )
        for m in report.models
        for s in m.speed
        if s.mode != OFFLINE
    )  # fmt: skip
    heads = (
        "Model", "Engine", "Load", "Tokens in + out", "TTFT, ms", "TPOT, ms", "ITL, ms", "E2E, ms",
        "Requests/s", "Goodput/s", "Within the SLO", "Failed",
    )  # fmt: skip
    return Table("Latencies over load: median / 99th percentile", heads, rows)


def power_table(report: Report) -> Table:
    """What the GPU drew and how fast it ran, where that was read."""
    rows = tuple(
        (
            label(m.name), s.engine, figures.load(s.mode, s.load),
            f"{s.input_len} + {s.output_len}", figures.plain(s.power_w),
            figures.plain(s.energy_j_tok), figures.plain(s.sm_clock_mhz, digits=4),
        )
        for m in report.models
        for s in m.speed
        if s.power_w is not None
    )  # fmt: skip
    heads = (
        "Model", "Engine", "Load", "Tokens in + out", "Power, W", "Joule an output token",
        "SM clock, MHz",
    )  # fmt: skip
    return Table("Power and clocks of the GPU, medians over the repeats", heads, rows)


def _two(speed: Speed, latency: str) -> str:
    p99 = speed.percentiles.get(latency, {}).get("p99")
    middle = {
        "ttft_ms": speed.ttft_ms, "tpot_ms": speed.tpot_ms, "itl_ms": speed.itl_ms,
        "e2e_ms": speed.e2e_ms,
    }[latency]  # fmt: skip
    return f"{figures.plain(middle)} / {figures.plain(p99)}"


def roofline_table(report: Report) -> Table:
    """Every bound beside what was measured."""
    rows = tuple(
        (
            label(r.model), r.engine, figures.load(r.mode, r.load),
            f"{r.input_len} + {r.output_len}", PHASES.get(r.phase, r.phase),
            figures.milliseconds(r.bound_s), figures.milliseconds(r.measured_s),
            figures.percent(r.attained), r.limited_by.replace("_", " "),
        )
        for r in (report.roofline.rows if report.roofline else ())
    )  # fmt: skip
    heads = (
        "Model", "Engine", "Load", "Tokens in + out", "Phase", "Bound", "Measured", "Attained",
        "Limited by",
    )  # fmt: skip
    return Table("Roofline: the least time the device needs, and what it took", heads, rows)


def overheads(report: Report) -> list[str]:
    """What decode steps take beyond their bounds, in a sentence for each workload."""
    return [
        f"On {o.engine}, {figures.load(o.mode, o.load)}, {o.input_len} + {o.output_len} tokens, a "
        f"decode step took {figures.milliseconds(o.outside_s)} beyond its bound and "
        f"{figures.milliseconds(o.per_layer_s)} for each layer"
        + (
            f" (the line misses {figures.milliseconds(o.unexplained_s)} at most)."
            if o.unexplained_s is not None
            else "."
        )
        for o in (report.roofline.overheads if report.roofline else ())
        if o.per_layer_s is not None and o.outside_s is not None
    ]


def predicted_table(report: Report) -> Table:
    """Measured speed-ups beside those that the bounds alone predict."""
    rows = tuple(
        (
            label(s.model), s.engine, s.rule.replace("_", " "), f"{s.input_len} + {s.output_len}",
            figures.load(s.mode, s.load), figures.times(s.ratio), figures.times(s.predicted),
        )
        for s in (report.roofline.speedup if report.roofline else ())
        if s.predicted is not None
    )  # fmt: skip
    heads = ("Model", "Engine", "Rule", "Tokens in + out", "Load", "Measured", "By the bounds")
    return Table("Speed-up, measured and as the bounds predict it", heads, rows)


def memory_table(report: Report) -> Table:
    """Weights and KV cache of every model at the loads that were measured, computed; beside the
    heaviest of them the peak that was seen."""
    peaks = {(p.model, _work(p)): p for p in report.memory}
    rows = tuple(
        (
            label(m.name), s.engine, figures.load(s.mode, s.load),
            f"{s.input_len} + {s.output_len}",
            *map(figures.size, (None, None, None) if total is None else _split(m, total)),
            *([_peak_words(peaks.get((m.name, _work(s))))] if peaks else []),
        )
        for m in report.models
        for s in m.speed
        if (total := m.memory_bytes(s)) is not None or (m.name, _work(s)) in peaks
    )  # fmt: skip
    heads = ("Model", "Engine", "Load", "Tokens in + out", "Weights", "KV cache", "Together")
    caption = "Memory, computed from weights and the KV cache of full requests"
    if not peaks:
        return Table(caption, heads, rows)
    return Table(f"{caption}; measured under the heaviest load", (*heads, "Measured peak"), rows)


def _split(model: Model, total: int) -> tuple[int, int, int]:
    """Weights, KV cache, both."""
    weights = model.weight_bytes or 0
    return weights, total - weights, total


def _work(found: Speed | Peak) -> tuple[str, str, float, int, int]:
    return found.engine, found.mode, found.load, found.input_len, found.output_len


def _peak_words(peak: Peak | None) -> str:
    """ "1.21 GB, whole process" or "310 MB added; 17.2 GB of GPUs"."""
    if peak is None:
        return figures.ABSENT
    host = f"{figures.size(peak.host_bytes)}{', whole process' if peak.own_process else ' added'}"
    said = [
        *([host] if peak.host_bytes is not None else []),
        *([f"{figures.size(peak.device_bytes)} of GPUs"] if peak.device_bytes is not None else []),
    ]
    return "; ".join(said) or figures.ABSENT


def cost_table(report: Report) -> Table:
    """What every stage took, and all of them together."""
    if report.cost is None or not report.cost.stages:
        return Table("Cost so far", (), ())
    cost = report.cost
    rows = [
        (
            s.stage, s.kind, figures.hours(s.seconds), str(s.devices),
            figures.ABSENT if s.tokens is None else figures.count(s.tokens),
        )
        for s in cost.stages
    ]  # fmt: skip
    whole = figures.hours(sum(s.seconds for s in cost.stages))
    rows.append(("together", "", whole, "", figures.count(cost.tokens)))
    heads = ("Stage", "Kind", "Time", f"{cost.device}s", "Tokens trained on")
    return Table("Cost so far: all attempts of every stage", heads, tuple(rows))


def cost_words(report: Report) -> str:
    """ "0.31 GPU-hours so far, 2.5 M tokens trained on"."""
    if report.cost is None or not report.cost.stages:
        return ""
    cost = report.cost
    tokens = f", {figures.count(cost.tokens)} tokens trained on" if cost.tokens else ""
    return f"{figures.plain(cost.hours)} {cost.device}-hours so far{tokens}."


def family_words(report: Report) -> str:
    """How many times cheaper the family is than from scratch, and on what that rests."""
    family = report.cost.family if report.cost else None
    if family is None or not family.flops or not family.all_flops:
        return ""
    saved = family.scratch_flops / family.flops
    really = family.scratch_flops / family.all_flops
    return (
        f"The whole family costs {figures.times(saved)} less to train than every member from "
        f"scratch ({figures.flops(family.flops)} against {figures.flops(family.scratch_flops)} "
        "FLOPs), by the count of the first Minitron paper, which found 1.8× for 15B, 8B and 4B: "
        "the largest from scratch, the others distilled. With all that this run did besides "
        "(the teacher's answers, correction, scoring, evaluation) it is "
        f"{figures.times(really)}. {family.basis[:1].upper()}{family.basis[1:]}."
    )


def family_table(report: Report) -> Table:
    """What every member of the family takes, from scratch and as it was made."""
    family = report.cost.family if report.cost else None
    rows = tuple(
        (
            label(m.model), figures.flops(m.flops_per_token), figures.count(m.scratch_tokens),
            figures.flops(m.flops_per_token * m.scratch_tokens), figures.count(m.tokens),
            figures.flops(m.flops_per_token * m.tokens),
        )
        for m in (family.members if family else ())
    )  # fmt: skip
    heads = (
        "Model", "FLOPs a token", "Tokens from scratch", "FLOPs from scratch", "Tokens here",
        "FLOPs here",
    )  # fmt: skip
    return Table("The family's training", heads, rows)


def layers_table(report: Report) -> Table:
    """What every layer is worth, by every metric that was measured."""
    found = report.importance.layers if report.importance else ()
    count = max((len(f.values) for f in found), default=0)
    rows = tuple(
        (
            str(i),
            *(figures.plain(f.values[i]) if i < len(f.values) else figures.ABSENT for f in found),
        )
        for i in range(count)
    )
    return Table("Layers by importance", ("Layer", *(f.metric for f in found)), rows)


def settings_table(report: Report) -> Table:
    """What was measured: every workload with its settings, as one who repeats it needs them."""
    rows = []
    for work in workloads(report):
        found = [s for m in report.models for s in m.speed if workload(s) == work]
        seconds = sum(s.measured_s or 0 for s in found)
        rows.append(
            (
                work.engine, figures.load(work.mode, work.load), MODES[work.mode],
                str(work.input_len), str(work.output_len), _span(s.repeats for s in found),
                _span(s.requests for s in found), figures.hours(seconds),
            )
        )  # fmt: skip
    heads = (
        "Engine", "Load", "Which means", "Tokens in", "Tokens out", "Repeats", "Requests a model",
        "Measured for",
    )  # fmt: skip
    return Table("Workloads", heads, tuple(rows))


def _span(values: Iterator[int]) -> str:
    found = sorted(set(values))
    if not found:
        return figures.ABSENT
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def runs_table(report: Report) -> Table:
    """The runs of a merged report."""
    rows = tuple(
        (
            label(r.name), r.title, r.created, (r.teacher_sha256 or figures.ABSENT)[:12],
            str(r.hardware.get("cpu", figures.ABSENT)), _versions(r.engines),
            figures.ABSENT if r.seed is None else str(r.seed),
        )
        for r in report.runs
    )  # fmt: skip
    heads = ("Run", "Title", "Made", "Teacher's sha256", "Machine", "Engines", "Seed")
    return Table("Runs", heads, rows)


def _versions(engines: dict[str, dict[str, object]]) -> str:
    said = (f"{n} ({', '.join(f'{k} {v}' for k, v in a.items())})" for n, a in engines.items())
    return "; ".join(said) or figures.ABSENT


def across_table(report: Report) -> Table:
    """Every model of every run beside the first run's teacher, by medians that are not paired."""
    if not report.runs:
        return Table("Across runs", (), ())
    rows: list[tuple[str, ...]] = []
    for work in workloads(report):
        found = throughputs(report, work)
        base = next((m for m in report.models if m.kind == TEACHER and m.name in found), None)
        if base is None or len({_run_of(report, n) for n in found}) < 2:
            continue
        for name, speed in found.items():
            same = _run_of(report, name) == base.run
            note = "same run" if same else "not paired"
            ratio = figures.times(speed.value / found[base.name].value)
            rows.append(
                (label(name), workload_words(work), figures.plain(speed.value), ratio,
                 label(base.name), note)
            )  # fmt: skip
    heads = ("Model", "Workload", "Output tok/s", "Ratio of medians", "Over", "Pairs")
    return Table("Across runs: ratios of medians, not paired", heads, tuple(rows))


def _run_of(report: Report, name: str) -> str | None:
    found = report.model(name)
    return found.run if found else None


def _range(low: float | None, high: float | None, digits: int = 3) -> str:
    if low is None or high is None:
        return figures.ABSENT
    return f"{figures.plain(low, digits=digits)} to {figures.plain(high, digits=digits)}"
