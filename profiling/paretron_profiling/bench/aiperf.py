"""aiperf: profile_export_aiperf.json with the records of its requests beside it, and how it is run.

Its names differ from ours: its "inter token latency" is our TPOT, its "inter chunk latency" our
ITL. Its throughput counts the time of the whole phase, before the first request and after the last
too; ours counts from the first request sent to the last token. Tokens are those that the server
counted, where it did: aiperf itself may count those of the text again, which special tokens are
not part of.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from paretron.artifacts.guard import regular_size
from paretron.artifacts.jsonfile import parse_object
from paretron.errors import Code
from paretron_profiling.bench.fields import MAX_FILE_BYTES, Fields, shortened
from paretron_profiling.bench.reading import (
    Lengths,
    Reading,
    Stated,
    Tokens,
    lengths_of,
    load_of,
)
from paretron_profiling.bench.run import Run
from paretron_profiling.engines.environment import clean_environment
from paretron_profiling.schema import CLOSED, OFFLINE, OPEN, Sample, Workload
from paretron_profiling.stats import PERCENTILES

NAME = ENGINE = "aiperf"
SUMMARY, RECORDS = "profile_export_aiperf.json", "profile_export.jsonl"

_LATEST_NS = 1e20
_THEIR_NAME = {
    "ttft_ms": "time_to_first_token",
    "tpot_ms": "inter_token_latency",
    "itl_ms": "inter_chunk_latency",
    "e2e_ms": "request_latency",
}
_COUNTED_AGAIN = "aiperf counted other tokens than the server: its TPOT is left out"


def read_run(file: Path, stated: Stated) -> list[Reading]:
    """One run, from its summary and, where they lie beside it, the records of its requests."""
    marks = ("aiperf_version", "input_config", "benchmark_duration", "request_count")
    fields = Fields.read(file, tool=NAME, marks=marks)
    if fields.values.get("was_cancelled") is not False:
        raise fields.refused("was_cancelled", "not false: not all requests were sent")
    mode, load, warmup = _phases(fields)
    mode, load = load_of(fields, (mode, load), stated=stated, key="input_config.phases")
    if stated.warmup is not None and bool(stated.warmup) != bool(warmup):
        raise fields.refused("input_config.phases", f"{warmup} warm-up, not {stated.warmup}")
    records = records_beside(file)
    found = list(_records(records)) if records else []
    if found and all("time_to_first_token" in r.child("metrics").values for r in _answered(found)):
        return [_detailed(fields, found, mode, load, warmup, stated)]
    return [_plain(fields, mode, load, warmup, stated)]


def records_beside(file: Path) -> Path | None:
    """The file of records that belongs to a summary; None where there is none."""
    name = RECORDS if file.name == SUMMARY else f"{file.stem}.jsonl"
    beside = file.with_name(name)
    return beside if beside.is_file() else None


def _phases(fields: Fields) -> tuple[str, float, int]:
    """Mode, load and the number of warm-up phases, from what the run was configured with."""
    phases = fields.child("input_config").objects("phases")
    warmups = [p for p in phases if p.text("kind") == "warmup"]
    measured = [p for p in phases if p.text("kind") != "warmup"]
    if len(measured) != 1:
        raise fields.refused("input_config.phases", f"{len(measured)} that count, not one")
    phase = measured[0]
    kind, in_flight = phase.text("type"), phase.values.get("concurrency")
    if kind == "concurrency":
        load, sent = phase.count("concurrency", least=1), phase.count("requests", least=1)
        return (OFFLINE, sent, len(warmups)) if load >= sent else (CLOSED, load, len(warmups))
    if kind == "poisson" and in_flight is None:
        return OPEN, phase.above_zero("rate"), len(warmups)
    raise phase.refused("type", f"{kind!r} with concurrency {in_flight}: no workload of ours")


def _records(file: Path) -> Iterator[Fields]:
    """The records of the phase that counts, one a request."""
    where = Fields({}, NAME, str(file))
    if regular_size(file) > MAX_FILE_BYTES:
        raise where.refused("the file", f"larger than {MAX_FILE_BYTES} bytes")
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            at = f"{file}:{number}"
            record = Fields(parse_object(line, where=at, code=Code.INPUT_CONFIG), NAME, at)
            if record.child("metadata").text("benchmark_phase") == "profiling":
                yield record


def _answered(records: list[Fields]) -> list[Fields]:
    return [r for r in records if r.values.get("error") is None]


def _detailed(
    fields: Fields, records: list[Fields], mode: str, load: float, warmup: int, stated: Stated
) -> Reading:
    done = _answered(records)
    if not done or len(done) != _value(fields, "request_count", "avg", "requests"):
        raise fields.refused("request_count", f"not {len(done)}, the records without an error")
    outputs = [_tokens(r, "usage_completion_tokens", "output_sequence_length") for r in done]
    inputs = [_tokens(r, "usage_prompt_tokens", "input_sequence_length") for r in done]
    lengths = lengths_of(
        fields, inputs=Tokens.of(inputs), outputs=Tokens.of(outputs), stated=stated
    )
    if any(n != lengths.output_len for n in outputs):
        return _plain(fields, mode, load, warmup, stated)
    starts = [r.child("metadata").count("request_start_ns", most=_LATEST_NS) for r in done]
    sent = [1e-9 * (start - min(starts)) for start in starts]
    took = [_seconds(r, "request_latency") for r in done]
    first = [_seconds(r, "time_to_first_token") for r in done]
    for record, until_first, until_last in zip(done, first, took, strict=True):
        if not 0 < until_first <= until_last:
            raise record.refused(
                "metrics.time_to_first_token", f"{until_first:g} s of {until_last:g} s in all"
            )
    sample = Sample(
        tuple(sent),
        tuple(s + t for s, t in zip(sent, first, strict=True)),
        tuple(s + t for s, t in zip(sent, took, strict=True)),
        tuple(gap for r in done for gap in _gaps(r)),
        failures=tuple(_reason(r) for r in records if r.values.get("error") is not None),
    )
    work = Workload(ENGINE, mode, load, lengths.input_len, lengths.output_len)
    return Reading.of_sample(work, sample, warmup=warmup, flags=lengths.flags, about=_about(fields))


def _plain(fields: Fields, mode: str, load: float, warmup: int, stated: Stated) -> Reading:
    """The reading of the medians that the summary states."""
    seconds = _value(fields, "benchmark_duration", "avg", "sec")
    completed = fields.child("request_count").count("avg", least=1)
    failed = round(_maybe_value(fields, "error_request_count", "avg", "requests") or 0.0)
    counted = "usage_completion_tokens" in fields.values
    total = "total_usage_completion_tokens" if counted else "total_osl"
    tokens = _value(fields, total, "avg", "tokens")
    if not (seconds > 0 and tokens > 0):
        raise fields.refused(total, f"{tokens:g} in {seconds:g} s")
    lengths = _lengths(fields, stated)
    figures = {"output_tok_s": tokens / seconds, "request_s": completed / seconds}
    recounted = counted and tokens != _maybe_value(fields, "total_osl", "avg", "tokens")
    percentiles = {}
    for name, theirs in _THEIR_NAME.items():
        if theirs in fields.values and not (name == "tpot_ms" and recounted):
            figures[name] = _value(fields, theirs, "p50", "ms")
            percentiles[name] = {
                f"p{p}": _value(fields, theirs, f"p{p}", "ms") for p in PERCENTILES
            }
    return Reading(
        Workload(ENGINE, mode, load, lengths.input_len, lengths.output_len),
        figures,
        requests=completed + failed,
        failed=failed,
        seconds=seconds,
        warmup=warmup,
        percentiles=percentiles,
        flags=lengths.flags,
        about=_about(fields),
        notes=(_COUNTED_AGAIN,) if recounted else (),
    )


def _lengths(fields: Fields, stated: Stated) -> Lengths:
    """From the summary's statistics over requests, the server's counts before aiperf's own."""
    sides = []
    for ours, theirs in (
        ("usage_prompt_tokens", "input_sequence_length"),
        ("usage_completion_tokens", "output_sequence_length"),
    ):
        name = ours if ours in fields.values else theirs
        sides.append(Tokens(*(_value(fields, name, k, "tokens") for k in ("avg", "min", "max"))))
    return lengths_of(fields, inputs=sides[0], outputs=sides[1], stated=stated)


def _value(fields: Fields, metric: str, key: str, unit: str) -> float:
    """A statistic of a metric, which must be in the unit that we take it for."""
    found = fields.child(metric)
    if found.text("unit") != unit:
        raise found.refused("unit", f"{found.text('unit')!r}, not {unit!r}")
    return found.number(key)


def _maybe_value(fields: Fields, metric: str, key: str, unit: str) -> float | None:
    return _value(fields, metric, key, unit) if fields.values.get(metric) is not None else None


def _seconds(record: Fields, metric: str) -> float:
    return 1e-3 * _value(record.child("metrics"), metric, "value", "ms")


def _tokens(record: Fields, ours: str, theirs: str) -> float:
    metrics = record.child("metrics")
    return _value(metrics, ours if ours in metrics.values else theirs, "value", "tokens")


def _gaps(record: Fields) -> list[float]:
    metrics = record.child("metrics")
    if "inter_chunk_latency" not in metrics.values:  # the whole answer came in one chunk
        return []
    found = metrics.child("inter_chunk_latency")
    if found.text("unit") != "ms":
        raise found.refused("unit", "not 'ms'")
    return [1e-3 * gap for gap in found.numbers("value")]


def _reason(record: Fields) -> str:
    error = record.child("error")
    said = (error.text("type") or "", error.text("message") or "")
    return shortened(": ".join(part for part in said if part)) or "no answer"


def _about(fields: Fields) -> dict[str, str]:
    endpoint = fields.child("input_config").child("endpoint")
    return {
        "tool": NAME,
        "version": fields.text("aiperf_version") or "unknown",
        "endpoint": endpoint.text("type") or "unknown",
    }


def command(run: Run, folder: Path) -> list[str]:
    """Against any OpenAI-compatible server that streams completions."""
    load = {
        OFFLINE: ["--concurrency", str(run.requests)],
        CLOSED: ["--concurrency", f"{run.load:g}"],
        OPEN: ["--request-rate", f"{run.load:g}", "--arrival-pattern", "poisson"],
    }[run.mode]
    warmup = ["--warmup-request-count", str(run.warmup)] if run.warmup else []
    return [
        str(run.python.parent / NAME), "profile",
        "--model", run.served, "--tokenizer", str(run.model.resolve()), "--url", run.url,
        "--endpoint-type", "completions", "--streaming", "--use-server-token-count", *load,
        "--request-count", str(run.requests), *warmup,
        "--isl", str(run.input_len), "--isl-stddev", "0",
        "--osl", str(run.output_len), "--osl-stddev", "0", "--random-seed", str(run.seed),
        "--extra-inputs", "ignore_eos:true", "--extra-inputs", "temperature:0",
        "--ui", "none", "--no-gpu-telemetry", "--no-server-metrics",
        "--artifact-dir", str(folder),
    ]  # fmt: skip


def environment() -> dict[str, str]:
    """As of all that we start, but not offline: aiperf then takes no folder for a tokenizer.

    A folder is all that it is given, so that it has nothing to ask of a hub.
    """
    return {k: v for k, v in clean_environment().items() if k != "HF_HUB_OFFLINE"}
