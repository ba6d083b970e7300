"""`vllm bench serve`, `throughput` and `latency`: their result files, and how they are run.

serve states times of every request with --save-detailed, and otherwise medians. throughput states
tokens a second of prompts and answers together, so that the output length must be known. latency
states how long each batch took as a whole. None of them tells whether it was warmed up.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median

from paretron_profiling.bench.fields import Fields
from paretron_profiling.bench.reading import (
    Lengths,
    Reading,
    Stated,
    Tokens,
    lengths_of,
    load_of,
)
from paretron_profiling.bench.run import Run
from paretron_profiling.engines.vllm_environment import MEMORY_SHARE
from paretron_profiling.schema import CLOSED, LATENCIES, OFFLINE, OPEN, Sample, Workload
from paretron_profiling.stats import PERCENTILES

SERVE, THROUGHPUT, LATENCY = "vllm-serve", "vllm-throughput", "vllm-latency"
NAMES = {
    SERVE: "vllm bench serve",
    THROUGHPUT: "vllm bench throughput",
    LATENCY: "vllm bench latency",
}
ENGINE = {
    SERVE: "vllm_bench_serve",
    THROUGHPUT: "vllm_bench_throughput",
    LATENCY: "vllm_bench_latency",
}
PROGRAM = Path(__file__).with_name("vllm_program.py")
RESULT = "result.json"

_THEIR_NAME = {"ttft_ms": "ttft", "tpot_ms": "tpot", "itl_ms": "itl", "e2e_ms": "e2el"}
_DETAILS = ("input_lens", "output_lens", "ttfts", "itls", "start_times", "errors")
_WHOLE = "requests_per_second", "tokens_per_second"
_CLOCK = 0.01  # what is stated twice agrees to 1 %


def read_serve(file: Path, stated: Stated) -> list[Reading]:
    """One run against a server, with raw times where the file was saved with --save-detailed."""
    marks = ("duration", "completed", "request_throughput", "output_throughput")
    fields = Fields.read(file, tool=NAMES[SERVE], marks=marks)
    completed, sent = fields.count("completed"), fields.count("num_prompts", least=1)
    if not 0 < completed <= sent:
        raise fields.refused("completed", f"{completed} of {sent}: no answer, no speed")
    about = {"tool": NAMES[SERVE], "backend": fields.text("backend") or "unknown"}
    mode, load = load_of(fields, _served_load(fields, sent), stated=stated, key="max_concurrency")
    if all(key in fields.values for key in _DETAILS):
        return [_detailed(fields, mode, load, stated=stated, about=about)]
    lengths = lengths_of(
        fields,
        inputs=Tokens.of([fields.number("total_input_tokens") / completed]),
        outputs=Tokens.of([fields.number("total_output_tokens") / completed]),
        stated=stated,
    )
    return [_plain(fields, mode, load, lengths, stated=stated, about=about)]


def read_throughput(file: Path, stated: Stated) -> list[Reading]:
    """One batch of prompts; its tokens a second count prompts and answers alike."""
    marks = ("elapsed_time", "num_requests", "total_num_tokens", "tokens_per_second")
    fields = Fields.read(file, tool=NAMES[THROUGHPUT], marks=marks)
    requests, seconds = fields.count("num_requests", least=1), fields.above_zero("elapsed_time")
    total = fields.count("total_num_tokens", least=1)
    for key, amount in zip(_WHOLE, (requests, total), strict=True):
        if abs(fields.number(key) * seconds - amount) > _CLOCK * amount:
            raise fields.refused(key, f"{fields.number(key):g}, but {amount} in {seconds:g} s")
    output_len = stated.output_len
    # What is left of all tokens are the prompts'; only whoever ran it knows how they are split.
    inputs = None if output_len is None else Tokens.of([total / requests - output_len])
    lengths = lengths_of(fields, inputs=inputs, outputs=None, stated=stated)
    mode, load = load_of(fields, (OFFLINE, requests), stated=stated, key="num_requests")
    return [
        Reading(
            Workload(ENGINE[THROUGHPUT], mode, load, lengths.input_len, lengths.output_len),
            {
                "output_tok_s": requests * lengths.output_len / seconds,
                "request_s": requests / seconds,
            },
            requests=requests,
            failed=0,
            seconds=seconds,
            warmup=stated.warmup,
            flags=lengths.flags,
            about={"tool": NAMES[THROUGHPUT]},
        )
    ]


def read_latency(file: Path, stated: Stated) -> list[Reading]:
    """Batches one after the other, each a run of its own; E2E is that of the whole batch."""
    fields = Fields.read(file, tool=NAMES[LATENCY], marks=("avg_latency", "latencies"))
    seconds = fields.numbers("latencies")
    if not seconds or min(seconds) <= 0:
        raise fields.refused("latencies", "empty, or has times that are not above 0")
    mean = sum(seconds) / len(seconds)
    if abs(fields.number("avg_latency") - mean) > _CLOCK * mean:
        raise fields.refused("avg_latency", f"not the mean of latencies, {mean:g}")
    lengths = lengths_of(fields, inputs=None, outputs=None, stated=stated)
    mode, load = load_of(fields, None, stated=stated, key="latencies")
    if mode != OFFLINE:
        raise fields.refused("latencies", f"of batches sent at once, but {mode} was asked for")
    work = Workload(ENGINE[LATENCY], mode, load, lengths.input_len, lengths.output_len)
    return [
        Reading(
            work,
            {
                "output_tok_s": load * work.output_len / taken,
                "request_s": load / taken,
                "e2e_ms": 1e3 * taken,
            },
            requests=int(load),
            failed=0,
            seconds=taken,
            warmup=stated.warmup,
            about={"tool": NAMES[LATENCY]},
        )
        for taken in seconds
    ]


def _served_load(fields: Fields, sent: int) -> tuple[str, float] | None:
    """What --max-concurrency and --request-rate made of the requests."""
    if fields.values.get("ramp_up_strategy") is not None:
        raise fields.refused("ramp_up_strategy", "set: a load that grows is no workload of ours")
    rate: object = fields.values.get("request_rate")
    at_once = rate == "inf"
    in_flight = fields.values.get("max_concurrency")
    if at_once:
        most = sent if in_flight is None else fields.count("max_concurrency", least=1)
        return (OFFLINE, sent) if most >= sent else (CLOSED, most)
    if in_flight is not None:
        raise fields.refused("max_concurrency", "a bound on an open loop: no workload of ours")
    if fields.number("burstiness") != 1.0:
        raise fields.refused("burstiness", "not 1: the arrivals are no Poisson process")
    return OPEN, fields.above_zero("request_rate")


def _detailed(
    fields: Fields, mode: str, load: float, *, stated: Stated, about: dict[str, str]
) -> Reading:
    """The reading of raw times, or of the medians where requests differ in output length."""
    sent = fields.count("num_prompts")
    input_lens, output_lens, ttfts, starts = (
        fields.numbers(key, length=sent)
        for key in ("input_lens", "output_lens", "ttfts", "start_times")
    )
    itls = fields.number_lists("itls", length=sent)
    errors = fields.texts("errors", length=sent)
    done = [i for i in range(sent) if not errors[i] and output_lens[i] > 0]
    if len(done) != fields.count("completed"):
        raise fields.refused("completed", f"not {len(done)}, the requests without an error")
    lengths = lengths_of(
        fields,
        inputs=Tokens.of([input_lens[i] for i in done]),
        outputs=Tokens.of([output_lens[i] for i in done]),
        stated=stated,
    )
    if any(output_lens[i] != lengths.output_len for i in done):
        return _plain(fields, mode, load, lengths, stated=stated, about=about)
    if late := [i for i in done if not ttfts[i] > 0]:
        raise fields.refused(f"ttfts[{late[0]}]", "0 of a request that was answered")
    began = min(starts[i] for i in done)
    first = [starts[i] - began + ttfts[i] for i in done]
    sample = Sample(
        tuple(starts[i] - began for i in done),
        tuple(first),
        tuple(t + sum(itls[i]) for t, i in zip(first, done, strict=True)),
        tuple(gap for i in done for gap in itls[i]),
        failures=tuple(errors[i] or "no answer" for i in range(sent) if i not in set(done)),
    )
    work = Workload(ENGINE[SERVE], mode, load, lengths.input_len, lengths.output_len)
    return Reading.of_sample(work, sample, warmup=stated.warmup, flags=lengths.flags, about=about)


def _plain(
    fields: Fields,
    mode: str,
    load: float,
    lengths: Lengths,
    *,
    stated: Stated,
    about: dict[str, str],
) -> Reading:
    """The reading of the medians that the file states."""
    completed, sent = fields.count("completed"), fields.count("num_prompts")
    seconds = fields.above_zero("duration")
    figures: dict[str, float | None] = {
        "output_tok_s": fields.above_zero("output_throughput"),
        "request_s": completed / seconds,
    }
    percentiles = {}
    for name in LATENCIES:
        theirs = _THEIR_NAME[name]
        figures[name] = fields.timed(f"median_{theirs}_ms")
        found = {f"p{p}": fields.timed(f"p{p}_{theirs}_ms") for p in PERCENTILES}
        whole = {p: value for p, value in found.items() if value is not None}
        if len(whole) == len(found):
            percentiles[name] = whole
    if figures["e2e_ms"] is None and completed == sent and "latencies" in fields.values:
        figures["e2e_ms"] = 1e3 * median(fields.numbers("latencies", length=sent))
    return Reading(
        Workload(ENGINE[SERVE], mode, load, lengths.input_len, lengths.output_len),
        {name: value for name, value in figures.items() if value is not None},
        requests=sent,
        failed=sent - completed,
        seconds=seconds,
        warmup=stated.warmup,
        percentiles=percentiles,
        flags=lengths.flags,
        about=about,
    )


def serve_command(run: Run, folder: Path) -> list[str]:
    """Against a server that runs; times of every request are kept."""
    load = {
        CLOSED: ["--max-concurrency", f"{run.load:g}"],
        OPEN: ["--request-rate", f"{run.load:g}"],
        OFFLINE: [],
    }[run.mode]
    return [
        str(run.python), "-I", str(PROGRAM), "serve",
        "--backend", "vllm", "--base-url", run.url,
        "--model", run.served, "--tokenizer", str(run.model.resolve()),
        *_random(run), "--temperature", "0", "--ignore-eos", *load,
        "--num-warmups", str(run.warmup), "--ready-check-timeout-sec", "60", "--disable-tqdm",
        "--percentile-metrics", "ttft,tpot,itl,e2el",
        "--metric-percentiles", ",".join(map(str, PERCENTILES)),
        "--save-result", "--save-detailed",
        "--result-dir", str(folder), "--result-filename", RESULT,
    ]  # fmt: skip


def throughput_command(run: Run, folder: Path) -> list[str]:
    """All prompts handed over at once; it ignores the end of sequence by itself."""
    return [
        str(run.python), "-I", str(PROGRAM), "throughput", *_engine(run),
        *_random(run), "--num-warmups", str(run.warmup),
        "--output-json", str(folder / RESULT),
    ]  # fmt: skip


def latency_command(run: Run, folder: Path) -> list[str]:
    """`requests / load` batches of exact length; it ignores the end of sequence by itself."""
    return [
        str(run.python), "-I", str(PROGRAM), "latency", *_engine(run),
        "--input-len", str(run.input_len), "--output-len", str(run.output_len),
        "--batch-size", f"{run.load:g}",
        "--num-iters-warmup", str(run.warmup), "--num-iters", str(run.requests // int(run.load)),
        "--output-json", str(folder / RESULT),
    ]  # fmt: skip


def _random(run: Run) -> list[str]:
    """Prompts made of random tokens; a seed of its own for each round, against prefix caches."""
    return [
        "--dataset-name", "random", "--random-input-len", str(run.input_len),
        "--random-output-len", str(run.output_len), "--num-prompts", str(run.requests),
        "--seed", str(run.seed),
    ]  # fmt: skip


def _engine(run: Run) -> list[str]:
    """An engine set up as the one that `paretron profile` measures."""
    return [
        "--model", str(run.model.resolve()), "--dtype", run.dtype, "--load-format", "safetensors",
        "--max-model-len", str(run.context_len), "--max-num-seqs", f"{run.load:g}",
        "--kv-cache-memory-bytes", str(run.kv_bytes),
        "--gpu-memory-utilization", str(MEMORY_SHARE), "--no-enable-prefix-caching",
        *(["--enforce-eager"] if run.eager else []),
    ]  # fmt: skip
