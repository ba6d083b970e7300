"""`trtllm-bench throughput` and `latency`: their report, and how they are run.

Written from the tool's sources, not from a run of it. The report states medians (of an even number
of values the upper of the two middle ones), of times to first and per further token only where it
streamed; neither the load nor failures nor warm-up.
"""

from __future__ import annotations

import json
from pathlib import Path

from paretron_profiling.bench.fields import Fields
from paretron_profiling.bench.reading import Reading, Stated, Tokens, lengths_of, load_of
from paretron_profiling.bench.run import Run
from paretron_profiling.prompts import random_prompts
from paretron_profiling.schema import CLOSED, OFFLINE, Workload
from paretron_profiling.stats import PERCENTILES

THROUGHPUT, LATENCY = "trtllm-throughput", "trtllm-latency"
NAME = "trtllm-bench"
ENGINE = "trtllm_bench"
RESULT, PROMPTS = "result.json", "prompts.jsonl"

_CLOCK = 0.01
_NO_FAILURES = "trtllm-bench does not tell how many requests failed"
_MEANS = "means alone are no medians: {} left out"


def read_report(file: Path, stated: Stated) -> list[Reading]:
    """One run, from the file of --report_json."""
    marks = ("engine", "world_info", "request_info", "performance")
    fields = Fields.read(file, tool=NAME, marks=marks)
    asked, speed = fields.child("request_info"), fields.child("performance")
    requests = asked.count("num_requests", least=1)
    seconds = 1e-3 * speed.above_zero("total_latency_ms")
    request_s = speed.above_zero("request_throughput_req_s")
    if abs(request_s * seconds - requests) > _CLOCK * requests:
        raise speed.refused(
            "request_throughput_req_s", f"{request_s:g}, but {requests} in {seconds:g} s"
        )
    lengths = lengths_of(
        fields,
        inputs=_inputs(fields, asked),
        outputs=Tokens.of([asked.above_zero("avg_output_length")]),
        stated=stated,
    )
    mode, load = load_of(fields, None, stated=stated, key="request_info")
    in_flight = asked.maybe("avg_num_concurrent_requests") or 0.0
    if mode == CLOSED and in_flight > load * (1 + _CLOCK):
        raise asked.refused(
            "avg_num_concurrent_requests", f"{in_flight:g}, but at most {load:g} were asked for"
        )
    medians, percentiles, notes = _latencies(fields, speed)
    return [
        Reading(
            Workload(ENGINE, mode, load, lengths.input_len, lengths.output_len),
            {
                "output_tok_s": speed.above_zero("system_output_throughput_tok_s"),
                "request_s": request_s,
            }
            | medians,
            requests=requests,
            failed=0,
            seconds=seconds,
            warmup=stated.warmup,
            percentiles=percentiles,
            flags=lengths.flags,
            about=_about(fields),
            notes=(_NO_FAILURES, *notes),
        )
    ]


def _inputs(fields: Fields, asked: Fields) -> Tokens:
    mean = asked.above_zero("avg_input_length")
    dataset = fields.maybe_child("dataset")
    stats = dataset.maybe_child("isl_stats") if dataset else None
    if stats is None:
        return Tokens.of([mean])
    return Tokens(mean, stats.number("minimum"), stats.number("maximum"))


def _latencies(
    fields: Fields, speed: Fields
) -> tuple[dict[str, float], dict[str, dict[str, float]], list[str]]:
    """Medians and percentiles by figure, and notes of what was left out."""
    streamed = fields.maybe_child("streaming_metrics")
    places = {
        "e2e_ms": (speed, "request_latency_percentiles_ms", "avg_request_latency_ms"),
        "ttft_ms": (streamed, "ttft_percentiles", "avg_ttft_ms"),
        "tpot_ms": (streamed, "tpot_percentiles", "avg_tpot_ms"),
    }
    medians: dict[str, float] = {}
    percentiles, left_out = {}, []
    for figure, (part, key, mean) in places.items():
        if part is None:
            continue
        found = part.maybe_child(key)
        value = found.timed("p50") if found else None
        if found and value is not None:
            medians[figure] = value
            every = {f"p{p}": found.timed(f"p{p}") for p in PERCENTILES}
            whole = {p: v for p, v in every.items() if v is not None}
            if len(whole) == len(every):
                percentiles[figure] = whole
        elif part.timed(mean) is not None:
            left_out.append(figure)
    return medians, percentiles, [_MEANS.format(", ".join(left_out))] if left_out else []


def _about(fields: Fields) -> dict[str, str]:
    engine, world = fields.child("engine"), fields.child("world_info")
    machine = fields.maybe_child("machine")
    said = {
        "version": engine.text("version"),
        "backend": engine.text("backend"),
        "dtype": engine.text("dtype"),
        "quantization": engine.text("quantization"),
        "kv_cache_dtype": engine.text("kv_cache_dtype"),
        "gpu": machine.text("name") if machine else None,
        "gpus": str(world.count("world_size", least=1)),
    }
    return {"tool": NAME} | {key: value for key, value in said.items() if value}


def throughput_command(run: Run, folder: Path) -> list[str]:
    """Requests at once, or so many in flight; without end of sequence (--eos_id -1)."""
    at_once = -1 if run.mode == OFFLINE else int(run.load)
    return [
        *_start(run, folder), "throughput", *_data(run, folder),
        "--concurrency", str(at_once), "--streaming", "--eos_id", "-1",
    ]  # fmt: skip


def latency_command(run: Run, folder: Path) -> list[str]:
    """Its engine takes one request at a time; it streams and ignores the end of sequence."""
    return [*_start(run, folder), "latency", *_data(run, folder), "--concurrency", f"{run.load:g}"]


def write_prompts(run: Run, folder: Path) -> None:
    """The requests as the tool reads them: token ids of exact length, a line each."""
    prompts = random_prompts(
        batch=run.requests,
        input_len=run.input_len,
        vocab_size=run.vocab_size,
        avoid=run.special_ids,
        seed=f"{run.seed}/{run.input_len}",
    )
    with (folder / PROMPTS).open("w", encoding="utf-8") as out:
        for place, prompt in enumerate(prompts):
            line = {"task_id": place, "input_ids": prompt, "output_tokens": run.output_len}
            out.write(json.dumps(line) + "\n")


def _start(run: Run, folder: Path) -> list[str]:
    # The model's name must be that of no folder; where it lies is said apart.
    return [
        str(run.python.parent / NAME), "--model", "paretron/model",
        "--model_path", str(run.model.resolve()), "--workspace", str(folder),
    ]  # fmt: skip


def _data(run: Run, folder: Path) -> list[str]:
    return [
        "--backend", "pytorch", "--dataset", str(folder / PROMPTS),
        "--num_requests", str(run.requests), "--warmup", str(run.warmup),
        "--max_seq_len", str(run.context_len), "--report_json", str(folder / RESULT),
    ]  # fmt: skip
