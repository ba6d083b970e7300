"""What result files say, against their raw numbers; data/bench/README.md says what made them."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from paretron.errors import Code, ParetronError
from paretron_profiling.bench import aiperf, trtllm_bench, vllm_bench
from paretron_profiling.bench.condense import profile_of
from paretron_profiling.bench.reading import Reading, Stated
from paretron_profiling.result import ProfileResult
from paretron_profiling.schema import BUNDLED, CLOSED, OFFLINE, OPEN, VARIED, Measurement

DATA = Path(__file__).with_name("data") / "bench"
NOTHING = Stated()


def raw(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DATA / name).read_text())
    return found


def records(folder: str) -> list[dict[str, Any]]:
    lines = (DATA / folder / aiperf.RECORDS).read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [r for r in found if r["metadata"]["benchmark_phase"] == "profiling"]


def one(readings: list[Reading]) -> Reading:
    assert len(readings) == 1
    return readings[0]


def load(reading: Reading) -> tuple[str, float, int, int]:
    work = reading.work
    return work.mode, work.load, work.input_len, work.output_len


def condensed(*readings: Reading) -> Measurement:
    profile = profile_of({"model": [[r] for r in readings]}, rounds=False, hardware={}, method={})
    assert ProfileResult.from_json(json.loads(json.dumps(profile.to_json()))) == profile
    (found,) = profile.measurements["model"]
    return found


def test_serve_with_details_by_hand() -> None:
    file = raw("vllm-serve-detailed.json")
    reading = one(vllm_bench.read_serve(DATA / "vllm-serve-detailed.json", NOTHING))
    assert load(reading) == (CLOSED, 4, 64, 16)
    e2e = [t + sum(gaps) for t, gaps in zip(file["ttfts"], file["itls"], strict=True)]
    began = min(file["start_times"])
    ends = [s + e - began for s, e in zip(file["start_times"], e2e, strict=True)]
    by_hand = {
        "ttft_ms": 1e3 * median(file["ttfts"]),
        "tpot_ms": 1e3 * median((e - t) / 15 for e, t in zip(e2e, file["ttfts"], strict=True)),
        "itl_ms": 1e3 * median(gap for gaps in file["itls"] for gap in gaps),
        "e2e_ms": 1e3 * median(e2e),
        "output_tok_s": 12 * 16 / max(ends),
        "request_s": 12 / max(ends),
    }
    assert reading.figures == pytest.approx(by_hand)
    assert (reading.requests, reading.failed, reading.warmup) == (12, 0, None)


@pytest.mark.parametrize("name", ["vllm-serve-detailed", "vllm-serve-rate", "vllm-serve-at-once"])
def test_the_tools_own_figures_are_ours(name: str) -> None:
    """What vLLM computes itself: latencies the same, throughput over a slightly longer time."""
    file = raw(f"{name}.json")
    measured = condensed(one(vllm_bench.read_serve(DATA / f"{name}.json", NOTHING)))
    for ours in ("ttft", "tpot", "itl"):
        assert getattr(measured, f"{ours}_ms") == pytest.approx(file[f"median_{ours}_ms"])
        assert measured.percentiles[f"{ours}_ms"]["p99"] == pytest.approx(file[f"p99_{ours}_ms"])
    assert measured.output_tok_s is not None
    assert 1 <= measured.output_tok_s / file["output_throughput"] < 1.02
    assert measured.samples[0].completed == file["completed"] == file["num_prompts"]


def test_serve_loads() -> None:
    rate = one(vllm_bench.read_serve(DATA / "vllm-serve-rate.json", NOTHING))
    assert load(rate) == (OPEN, 8.0, 64, 16)
    at_once = one(vllm_bench.read_serve(DATA / "vllm-serve-at-once.json", NOTHING))
    assert load(at_once) == (OFFLINE, 6, 64, 16)
    assert at_once.figures["prefill_tok_s"] > at_once.figures["output_tok_s"]


def test_serve_without_details_states_medians() -> None:
    file = raw("vllm-serve-plain.json")
    reading = one(vllm_bench.read_serve(DATA / "vllm-serve-plain.json", NOTHING))
    assert load(reading) == (CLOSED, 4, 64, 16)
    theirs = {"ttft_ms": "ttft", "tpot_ms": "tpot", "itl_ms": "itl", "e2e_ms": "e2el"}
    for ours, name in theirs.items():
        assert reading.figures[ours] == file[f"median_{name}_ms"] != file[f"mean_{name}_ms"]
    assert reading.figures["output_tok_s"] == file["output_throughput"]
    assert file["total_token_throughput"] > 4 * file["output_throughput"]
    measured = condensed(reading)
    assert (measured.samples, measured.repeats, measured.percentiles) == ((), 1, {})
    assert measured.prefill_tok_s is None
    assert measured.goodput_s is None


def test_what_a_file_does_not_state_stays_empty(tmp_path: Path) -> None:
    file = raw("vllm-serve-plain.json")
    for key in ("median_tpot_ms", "median_e2el_ms", "latencies"):
        del file[key]
    file["median_itl_ms"] = 0.0  # what vLLM writes where there were no times
    (tmp_path / "a.json").write_text(json.dumps(file))
    measured = condensed(one(vllm_bench.read_serve(tmp_path / "a.json", NOTHING)))
    assert (measured.tpot_ms, measured.itl_ms, measured.e2e_ms) == (None, None, None)
    assert measured.ttft_ms == file["median_ttft_ms"]


def test_serve_with_failures_and_a_short_answer() -> None:
    """Its answers differ in length, so that the raw times would give another TPOT."""
    file = raw("vllm-serve-failures.json")
    reading = one(vllm_bench.read_serve(DATA / "vllm-serve-failures.json", NOTHING))
    assert sorted(file["output_lens"]) == [0, 0, 0, 11, 16, 16, 16, 16]
    assert (reading.requests, reading.failed, reading.flags) == (8, 3, (VARIED,))
    assert reading.sample is None
    assert reading.figures["tpot_ms"] == file["median_tpot_ms"]
    assert reading.figures["output_tok_s"] == file["output_throughput"]
    with pytest.raises(ParetronError, match=r"input length is 450\.2 tokens, but 64 were"):
        vllm_bench.read_serve(DATA / "vllm-serve-failures.json", Stated(input_len=64))


def test_an_answer_that_ended_early_is_flagged(tmp_path: Path) -> None:
    file = raw("vllm-serve-plain.json")
    file["total_output_tokens"] -= 2
    (tmp_path / "a.json").write_text(json.dumps(file))
    reading = one(vllm_bench.read_serve(tmp_path / "a.json", Stated(output_len=16)))
    assert (reading.work.output_len, reading.flags) == (16, (VARIED,))


def test_throughput_counts_prompts_and_answers() -> None:
    file = raw("vllm-throughput.json")
    said = Stated(output_len=16, warmup=8)
    reading = one(vllm_bench.read_throughput(DATA / "vllm-throughput.json", said))
    assert load(reading) == (OFFLINE, 8, 64, 16)
    assert reading.figures == pytest.approx(
        {"output_tok_s": 8 * 16 / file["elapsed_time"], "request_s": 8 / file["elapsed_time"]}
    )
    assert file["tokens_per_second"] == pytest.approx(5 * reading.figures["output_tok_s"])
    with pytest.raises(ParetronError, match="does not tell the output length") as refused:
        vllm_bench.read_throughput(DATA / "vllm-throughput.json", NOTHING)
    assert refused.value.problems[0].code is Code.USAGE
    with pytest.raises(ParetronError, match="input length is 64 tokens, but 128"):
        vllm_bench.read_throughput(DATA / "vllm-throughput.json", Stated(None, None, 128, 16))


def test_latency_is_of_batches() -> None:
    file = raw("vllm-latency.json")
    readings = vllm_bench.read_latency(DATA / "vllm-latency.json", Stated(OFFLINE, 4, 64, 16, 2))
    assert [r.figures["e2e_ms"] for r in readings] == [1e3 * s for s in file["latencies"]]
    measured = condensed(*readings)
    assert (measured.repeats, measured.requests) == (5, 20)
    assert measured.output_tok_s == pytest.approx(4 * 16 / median(file["latencies"]))
    assert measured.e2e_ms == pytest.approx(1e3 * file["percentiles"]["50"])
    assert measured.ttft_ms is None
    with pytest.raises(ParetronError, match="does not tell the load"):
        vllm_bench.read_latency(DATA / "vllm-latency.json", Stated(None, None, 64, 16))


def test_aiperf_by_hand() -> None:
    file, found = raw("aiperf/profile_export_aiperf.json"), records("aiperf")
    reading = one(aiperf.read_run(DATA / "aiperf" / aiperf.SUMMARY, NOTHING))
    assert load(reading) == (CLOSED, 4, 64, 16)
    assert (len(found), reading.requests, reading.warmup) == (12, 12, 1)
    values = [{k: m["value"] for k, m in r["metrics"].items()} for r in found]
    starts = [r["metadata"]["request_start_ns"] for r in found]
    ends = [s + 1e6 * v["request_latency"] for s, v in zip(starts, values, strict=True)]
    seconds = 1e-9 * (max(ends) - min(starts))
    by_hand = {
        "ttft_ms": median(v["time_to_first_token"] for v in values),
        "tpot_ms": median((v["request_latency"] - v["time_to_first_token"]) / 15 for v in values),
        "itl_ms": median(gap for v in values for gap in v["inter_chunk_latency"]),
        "e2e_ms": median(v["request_latency"] for v in values),
        "output_tok_s": 12 * 16 / seconds,
        "request_s": 12 / seconds,
    }
    assert reading.figures == pytest.approx(by_hand)
    # Its "inter token latency" is our TPOT; its throughput is over a longer time than ours.
    assert by_hand["tpot_ms"] == pytest.approx(file["inter_token_latency"]["p50"])
    assert file["inter_token_latency"]["p50"] > 2 * file["inter_chunk_latency"]["p50"]
    assert seconds == pytest.approx(file["benchmark_duration"]["avg"])
    assert by_hand["output_tok_s"] > 1.03 * file["output_token_throughput"]["avg"]


@pytest.mark.parametrize("name", ["aiperf", "aiperf-rate", "aiperf-failures"])
def test_aiperf_summary_alone_says_the_same(name: str, tmp_path: Path) -> None:
    shutil.copy(DATA / name / aiperf.SUMMARY, tmp_path)
    plain = one(aiperf.read_run(tmp_path / aiperf.SUMMARY, NOTHING))
    whole = one(aiperf.read_run(DATA / name / aiperf.SUMMARY, NOTHING))
    assert plain.sample is None
    assert whole.sample is not None
    assert load(plain) == load(whole)
    assert plain.flags == whole.flags
    assert plain.figures == pytest.approx(whole.figures)
    assert (plain.requests, plain.failed) == (whole.requests, whole.failed)
    assert condensed(plain).percentiles["e2e_ms"] == pytest.approx(
        condensed(whole).percentiles["e2e_ms"]
    )


def test_aiperf_open_loop_and_failures() -> None:
    rate = one(aiperf.read_run(DATA / "aiperf-rate" / aiperf.SUMMARY, NOTHING))
    assert load(rate) == (OPEN, 8.0, 64, 16)
    assert rate.warmup == 0
    assert rate.sample is not None
    assert all(a < b for a, b in pairwise(sorted(rate.sample.sent_s)))
    failed = one(aiperf.read_run(DATA / "aiperf-failures" / aiperf.SUMMARY, NOTHING))
    assert (failed.requests, failed.failed, failed.flags) == (8, 2, (VARIED,))
    assert failed.sample is not None
    assert "maximum context length is 512" in failed.sample.failures[0]


def test_aiperf_counts_the_servers_tokens(tmp_path: Path) -> None:
    """aiperf without --use-server-token-count counts the text's tokens, special ones left out."""
    shutil.copytree(DATA / "aiperf", tmp_path / "run")
    file = raw("aiperf/profile_export_aiperf.json")
    for name in ("total_osl", "output_token_throughput"):
        file[name]["avg"] *= 0.75
    for key in ("avg", "min", "p50"):
        file["output_sequence_length"][key] = 12.0
    (tmp_path / "run" / aiperf.SUMMARY).write_text(json.dumps(file))
    lines = (DATA / "aiperf" / aiperf.RECORDS).read_text()
    recounted = lines.replace(
        '"output_sequence_length": {"value": 16,', '"output_sequence_length": {"value": 12,'
    )
    assert recounted != lines
    (tmp_path / "run" / aiperf.RECORDS).write_text(recounted)
    for records_too in (True, False):
        if not records_too:
            (tmp_path / "run" / aiperf.RECORDS).unlink()
        reading = one(aiperf.read_run(tmp_path / "run" / aiperf.SUMMARY, NOTHING))
        assert reading.work.output_len == 16
        assert reading.figures["output_tok_s"] == pytest.approx(
            192 / file["benchmark_duration"]["avg"]
        )
        assert ("tpot_ms" in reading.figures) is records_too
    assert "aiperf counted other tokens" in reading.notes[0]


def test_trtllm_report_as_documented() -> None:
    file = raw("trtllm-documented-streaming.json")
    said = Stated(CLOSED, 4)
    reading = one(trtllm_bench.read_report(DATA / "trtllm-documented-streaming.json", said))
    assert load(reading) == (CLOSED, 4, 128, 32)
    speed, streamed = file["performance"], file["streaming_metrics"]
    assert reading.figures == {
        "output_tok_s": speed["system_output_throughput_tok_s"],
        "request_s": speed["request_throughput_req_s"],
        "e2e_ms": speed["request_latency_percentiles_ms"]["p50"],
        "ttft_ms": streamed["ttft_percentiles"]["p50"],
        "tpot_ms": streamed["tpot_percentiles"]["p50"],
    }
    assert reading.figures["output_tok_s"] * 5 == pytest.approx(
        speed["system_total_throughput_tok_s"]
    )
    assert reading.percentiles["tpot_ms"]["p99"] == streamed["tpot_percentiles"]["p99"]
    assert reading.about["version"] == "1.2.1"
    with pytest.raises(ParetronError, match="does not tell the load"):
        trtllm_bench.read_report(DATA / "trtllm-documented-streaming.json", NOTHING)
    with pytest.raises(ParetronError, match=r"avg_num_concurrent_requests is 3.* but at most 2"):
        trtllm_bench.read_report(DATA / "trtllm-documented-streaming.json", Stated(CLOSED, 2))


def test_trtllm_without_streaming_has_no_first_token() -> None:
    said = Stated(OFFLINE, 16)
    reading = one(trtllm_bench.read_report(DATA / "trtllm-documented.json", said))
    assert set(reading.figures) == {"output_tok_s", "request_s", "e2e_ms"}


def test_a_mean_is_no_median(tmp_path: Path) -> None:
    file = raw("trtllm-documented-streaming.json")
    del file["streaming_metrics"]["ttft_percentiles"]
    (tmp_path / "a.json").write_text(json.dumps(file))
    reading = one(trtllm_bench.read_report(tmp_path / "a.json", Stated(CLOSED, 4)))
    assert "ttft_ms" not in reading.figures
    assert reading.notes[-1] == "means alone are no medians: ttft_ms left out"


def test_tokens_read_in_bundles_are_flagged() -> None:
    """The gaps of this run are 4 us in the median, where a token took 6 ms."""
    late = one(vllm_bench.read_serve(DATA / "vllm-serve-detailed.json", NOTHING))
    assert BUNDLED in condensed(late).flags
    in_time = one(vllm_bench.read_serve(DATA / "vllm-serve-rate.json", NOTHING))
    assert BUNDLED not in condensed(in_time).flags
