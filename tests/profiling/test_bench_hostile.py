"""Result files that are broken, hostile or of another tool: the key is named, or it makes sense."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paretron.errors import Code, ParetronError
from paretron_profiling.bench import aiperf, trtllm_bench, vllm_bench
from paretron_profiling.bench import fields as fields_module
from paretron_profiling.bench.condense import profile_of
from paretron_profiling.bench.reading import Reading, Stated
from paretron_profiling.bench.tools import TOOLS
from paretron_profiling.schema import CLOSED, OFFLINE

DATA = Path(__file__).with_name("data") / "bench"
BATCH = Stated(OFFLINE, 4, 64, 16)

# Tool, file, what is stated beside it.
FILES: dict[str, tuple[str, str, Stated]] = {
    "detailed": (vllm_bench.SERVE, "vllm-serve-detailed.json", Stated()),
    "plain": (vllm_bench.SERVE, "vllm-serve-plain.json", Stated()),
    "rate": (vllm_bench.SERVE, "vllm-serve-rate.json", Stated()),
    "failures": (vllm_bench.SERVE, "vllm-serve-failures.json", Stated()),
    "throughput": (vllm_bench.THROUGHPUT, "vllm-throughput.json", Stated(output_len=16)),
    "latency": (vllm_bench.LATENCY, "vllm-latency.json", BATCH),
    "trtllm": (
        trtllm_bench.THROUGHPUT, "trtllm-documented-streaming.json", Stated(CLOSED, 4)
    ),
    "aiperf": (aiperf.NAME, f"aiperf/{aiperf.SUMMARY}", Stated()),
}  # fmt: skip
ODD: tuple[Any, ...] = (
    None, True, "text", "inf", "", -1, -1.5, 0, 0.5, 1e-300, 1e300, 10**400, [], {}, [None],
    [[1.0]], {"unit": "ms"}, [{}], math.nan, math.inf, -math.inf, "\x1b[2J</script>", "9" * 5000,
)  # fmt: skip


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a value; of a long list the first and last."""
    if at:
        yield at
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from paths(inner, (*at, key))
    elif isinstance(value, list) and value:
        for place in {0, len(value) - 1}:
            yield from paths(value[place], (*at, place))


def put(value: Any, at: tuple[Any, ...], odd: Any) -> None:
    """Replace what stands at a path; Ellipsis takes it away."""
    for key in at[:-1]:
        value = value[key]
    if odd is ...:
        del value[at[-1]]
    else:
        value[at[-1]] = odd


def sensible(readings: list[Reading]) -> None:
    """Figures that are numbers, and a profile that can be written."""
    for reading in readings:
        assert all(math.isfinite(v) and v >= 0 for v in reading.figures.values()), reading.figures
        assert 0 <= reading.failed < reading.requests
        assert reading.work.input_len > 0
        assert reading.work.load > 0
    profile = profile_of({"teacher": [readings]}, rounds=False, hardware={}, method={})
    json.dumps(profile.to_json(), allow_nan=False)


@pytest.mark.parametrize("name", FILES)
@given(data=st.data())
def test_any_value_anywhere(
    name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tool, source, stated = FILES[name]
    whole = json.loads((DATA / source).read_text())
    at = data.draw(st.sampled_from(list(paths(whole))))
    put(whole, at, data.draw(st.sampled_from((..., *ODD))))
    file = tmp_path_factory.mktemp("hostile") / "result.json"
    file.write_text(json.dumps(whole))
    try:
        sensible(TOOLS[tool].read(file, stated))
    except ParetronError as error:
        assert error.problems[0].code in (Code.INPUT_CONFIG, Code.USAGE)
        assert str(file) in str(error)
        assert "\x1b" not in str(error)


@given(data=st.data())
def test_any_value_in_a_record(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / aiperf.SUMMARY).write_bytes((DATA / "aiperf" / aiperf.SUMMARY).read_bytes())
    lines = (DATA / "aiperf" / aiperf.RECORDS).read_text().splitlines()
    record = json.loads(lines[-1])
    put(
        record,
        data.draw(st.sampled_from(list(paths(record)))),
        data.draw(st.sampled_from((..., *ODD))),
    )
    lines[-1] = json.dumps(record)
    (folder / aiperf.RECORDS).write_text("\n".join(lines))
    try:
        sensible(aiperf.read_run(folder / aiperf.SUMMARY, Stated()))
    except ParetronError as error:
        assert error.problems[0].code is Code.INPUT_CONFIG
        assert str(folder) in str(error)


@pytest.mark.parametrize(
    ("name", "at", "odd", "said"),
    [
        ("plain", ("output_throughput",), ..., "output_throughput is absent"),
        ("plain", ("output_throughput",), 0.0, "output_throughput is 0, not above 0"),
        ("plain", ("median_ttft_ms",), -1.0, "median_ttft_ms is -1.0, not from 0"),
        ("plain", ("median_ttft_ms",), "7", "median_ttft_ms is a str, not a number"),
        ("plain", ("median_ttft_ms",), True, "median_ttft_ms is a bool, not a number"),
        ("plain", ("median_ttft_ms",), math.nan, "NaN is not a JSON number"),
        ("plain", ("median_ttft_ms",), 10**400, "median_ttft_ms is 1000000000"),
        ("plain", ("completed",), 0, "no answer, no speed"),
        ("plain", ("completed",), 13, "13 of 12"),
        ("plain", ("request_rate",), 8.0, "a bound on an open loop"),
        ("plain", ("total_output_tokens",), 6, "the mean output length is 0.5 tokens"),
        ("rate", ("burstiness",), 0.5, "burstiness is not 1"),
        ("rate", ("request_rate",), "fast", "request_rate is a str"),
        ("rate", ("ramp_up_strategy",), "linear", "a load that grows"),
        ("detailed", ("ttfts",), [0.1], "ttfts is a list of 1, not of 12"),
        ("detailed", ("itls", 3), 0.1, "itls[3] is not a list"),
        ("detailed", ("itls", 3, 2), None, "itls[3][2] is absent"),
        ("detailed", ("errors", 0), "Bad Request", "completed is not 11"),
        ("throughput", ("tokens_per_second",), 1.0, "tokens_per_second is 1, but 640 in"),
        ("latency", ("latencies", 0), 0.0, "not above 0"),
        ("latency", ("avg_latency",), 1.0, "avg_latency is not the mean"),
        ("trtllm", ("performance", "request_throughput_req_s"), 1.0, "performance.request_thr"),
        ("trtllm", ("performance",), [], "performance is not an object"),
        ("aiperf", ("was_cancelled",), True, "was_cancelled is not false"),
        ("aiperf", ("input_config", "phases", 1, "type"), "gamma", "no workload of ours"),
        ("aiperf", ("input_config", "phases", 1, "kind"), "warmup", "0 that count, not one"),
        ("aiperf", ("request_count", "unit"), "kilorequests", "request_count.unit is"),
        ("aiperf", ("request_count", "avg"), 11.0, "request_count is not 12"),
    ],
)
def test_the_key_is_named(
    name: str, at: tuple[Any, ...], odd: Any, said: str, tmp_path: Path
) -> None:
    tool, source, stated = FILES[name]
    whole = json.loads((DATA / source).read_text())
    put(whole, at, odd)
    file = tmp_path / Path(source).name
    file.write_text(json.dumps(whole))
    records = (DATA / source).with_name(aiperf.RECORDS)
    if records.is_file():
        (tmp_path / aiperf.RECORDS).write_bytes(records.read_bytes())
    with pytest.raises(ParetronError) as refused:
        TOOLS[tool].read(file, stated)
    assert said in str(refused.value)
    assert refused.value.exit_code == 3


@pytest.mark.parametrize(
    ("tool", "name"),
    [(t, n) for t in TOOLS for n in FILES if TOOLS[t].read is not TOOLS[FILES[n][0]].read],
)
def test_a_file_of_another_tool(tool: str, name: str) -> None:
    _, source, stated = FILES[name]
    with pytest.raises(ParetronError, match="this is no result file of") as refused:
        TOOLS[tool].read(DATA / source, stated)
    assert refused.value.problems[0].code is Code.INPUT_CONFIG


def test_a_file_too_large_and_one_that_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fields_module, "MAX_FILE_BYTES", 1000)
    with pytest.raises(ParetronError, match="larger than 1000"):
        vllm_bench.read_serve(DATA / "vllm-serve-plain.json", Stated())
    monkeypatch.setattr(aiperf, "MAX_FILE_BYTES", 1000)
    monkeypatch.setattr(fields_module, "MAX_FILE_BYTES", 1 << 20)
    with pytest.raises(ParetronError, match="larger than 1000"):
        aiperf.read_run(DATA / "aiperf" / aiperf.SUMMARY, Stated())
    with pytest.raises(ParetronError, match="a folder, not a file"):
        vllm_bench.read_serve(tmp_path, Stated())
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ParetronError, match="not a JSON object"):
        vllm_bench.read_serve(tmp_path / "list.json", Stated())
