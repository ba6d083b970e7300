"""How other tools are run: exact command lines, turns, their processes, what is published."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from paretron.cli.main import main
from paretron.errors import Code, ParetronError
from paretron.recipe import Engine as EngineSettings
from paretron.run.bench import publish_bench
from paretron_profiling.bench import aiperf, trtllm_bench, vllm_bench
from paretron_profiling.bench.drive import Served, Settings, driven, requests_of
from paretron_profiling.bench.run import Run, run_tool
from paretron_profiling.bench.tools import TOOLS, Tool
from paretron_profiling.engines.ortgenai import ENGINE as ORTGENAI
from paretron_profiling.models import ModelUnderTest
from paretron_profiling.result import ProfileResult, ProfileStopped
from paretron_profiling.schema import CLOSED, OFFLINE, OPEN

DATA = Path(__file__).with_name("data") / "bench"
HERE = Path(sys.executable)
RUN = Run(
    python=Path("/opt/tools/bin/python"), model=Path("/models/width"), mode=CLOSED, load=4.0,
    requests=32, input_len=64, output_len=16, warmup=4, seed=7, url="http://127.0.0.1:8000",
    served="student", dtype="bfloat16", kv_bytes=1 << 26, vocab_size=320,
    special_ids=frozenset({0, 1, 2}),
)  # fmt: skip


def options(command: list[str]) -> dict[str, str]:
    """Every option with what follows it."""
    pairs = zip(command, [*command[1:], ""], strict=True)
    return {a: b for a, b in pairs if a.startswith("--")}


def test_vllm_serve_command() -> None:
    command = vllm_bench.serve_command(RUN, Path("/out"))
    assert command[:2] == ["/opt/tools/bin/python", "-I"]
    assert command[3] == "serve"
    assert Path(command[2]).is_file()
    found = options(command)
    wanted = {
        "--base-url": "http://127.0.0.1:8000", "--model": "student", "--tokenizer": "/models/width",
        "--random-input-len": "64", "--random-output-len": "16", "--num-prompts": "32",
        "--max-concurrency": "4", "--num-warmups": "4", "--seed": "7", "--temperature": "0",
        "--metric-percentiles": "50,90,95,99", "--result-dir": "/out",
    }  # fmt: skip
    assert {k: found[k] for k in wanted} == wanted
    assert {"--ignore-eos", "--save-result", "--save-detailed"} <= set(command)
    rate = options(vllm_bench.serve_command(replace(RUN, mode=OPEN, load=2.5), Path("/out")))
    assert rate["--request-rate"] == "2.5"
    assert "--max-concurrency" not in rate
    at_once = options(vllm_bench.serve_command(replace(RUN, mode=OFFLINE), Path("/out")))
    assert not {"--request-rate", "--max-concurrency"} & set(at_once)


def test_vllm_offline_commands() -> None:
    run = replace(RUN, mode=OFFLINE, load=8.0, requests=8, eager=True)
    found = options(vllm_bench.throughput_command(run, Path("/out")))
    wanted = {
        "--model": "/models/width", "--dtype": "bfloat16", "--num-prompts": "8",
        "--max-num-seqs": "8", "--max-model-len": "96", "--kv-cache-memory-bytes": str(1 << 26),
        "--num-warmups": "4", "--output-json": "/out/result.json",
    }  # fmt: skip
    assert {k: found[k] for k in wanted} == wanted
    assert {"--enforce-eager", "--no-enable-prefix-caching"} <= set(found)
    run = replace(run, requests=64, eager=False)
    found = options(vllm_bench.latency_command(run, Path("/out")))
    wanted = {
        "--input-len": "64", "--output-len": "16", "--batch-size": "8", "--num-iters": "8",
        "--num-iters-warmup": "4",
    }  # fmt: skip
    assert {k: found[k] for k in wanted} == wanted
    assert "--enforce-eager" not in found


def test_trtllm_commands(tmp_path: Path) -> None:
    command = trtllm_bench.throughput_command(RUN, tmp_path)
    assert command[0] == "/opt/tools/bin/trtllm-bench"
    found = options(command)
    wanted = {
        "--model_path": "/models/width", "--backend": "pytorch", "--concurrency": "4",
        "--num_requests": "32", "--warmup": "4", "--eos_id": "-1",
        "--dataset": str(tmp_path / "prompts.jsonl"),
        "--report_json": str(tmp_path / "result.json"),
    }  # fmt: skip
    assert {k: found[k] for k in wanted} == wanted
    assert "--streaming" in found
    assert command.index("--model_path") < command.index("throughput") < command.index("--backend")
    at_once = trtllm_bench.throughput_command(replace(RUN, mode=OFFLINE), tmp_path)
    assert options(at_once)["--concurrency"] == "-1"
    latency = options(trtllm_bench.latency_command(RUN, tmp_path))
    assert not {"--streaming", "--eos_id"} & set(latency)
    trtllm_bench.write_prompts(RUN, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert len(lines) == 32
    assert {len(line["input_ids"]) for line in lines} == {64}
    assert {line["output_tokens"] for line in lines} == {16}
    assert min(t for line in lines for t in line["input_ids"]) > 2


def test_aiperf_command(monkeypatch: pytest.MonkeyPatch) -> None:
    command = aiperf.command(RUN, Path("/out"))
    assert command[:2] == ["/opt/tools/bin/aiperf", "profile"]
    found = options(command)
    wanted = {
        "--url": "http://127.0.0.1:8000", "--model": "student", "--tokenizer": "/models/width",
        "--concurrency": "4", "--request-count": "32", "--warmup-request-count": "4",
        "--isl": "64", "--osl": "16", "--isl-stddev": "0", "--osl-stddev": "0",
        "--random-seed": "7", "--artifact-dir": "/out", "--endpoint-type": "completions",
    }  # fmt: skip
    assert {k: found[k] for k in wanted} == wanted
    assert {"--streaming", "--use-server-token-count", "ignore_eos:true"} <= set(command)
    assert "--warmup-request-count" not in aiperf.command(replace(RUN, warmup=0), Path("/out"))
    rate = options(aiperf.command(replace(RUN, mode=OPEN, load=2.5), Path("/out")))
    assert (rate["--request-rate"], rate["--arrival-pattern"]) == ("2.5", "poisson")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert not {"HF_HUB_OFFLINE", "HF_TOKEN"} & set(aiperf.environment())


# A tool that writes a recorded result, after a time that its load says.
PROGRAM = """
import json, sys, time
kind, source, target, log = sys.argv[1:]
with open(log, "a") as file:
    file.write(target + "\\n")
print("working on it")
if kind == "sleep":
    time.sleep(600)
if kind == "fail":
    print("out of paper"); sys.exit(3)
if kind == "write":
    open(target, "w").write(open(source).read())
"""


def recorded(kinds: Mapping[str, str], log: Path) -> Tool:
    """vllm bench throughput, whose process does what its model's name says."""

    def command(run: Run, folder: Path) -> list[str]:
        kind = kinds[f"{run.model.name}/{run.seed}"]
        source = DATA / "vllm-throughput.json"
        return [
            str(HERE), "-c", PROGRAM, kind, str(source), str(folder / "result.json"), str(log)
        ]  # fmt: skip

    tool = TOOLS[vllm_bench.THROUGHPUT]
    # Any file that is there will do for the tool itself.
    return replace(tool, command=command, executable=HERE.name)


def measure(
    models: list[ModelUnderTest], tmp_path: Path, *, kinds: Mapping[str, str], timeout_s: float = 60
) -> ProfileResult:
    settings = Settings(
        tool=vllm_bench.THROUGHPUT, mode="offline", load=8, input_len=64, output_len=16,
        repeats=2, timeout_s=timeout_s,
    )  # fmt: skip
    publish_bench(
        models[:2],
        tool=recorded(kinds, tmp_path / "order"),
        python=HERE,
        settings=settings,
        served=None,
        out=tmp_path / "out",
        overwrite=False,
        on_event=lambda *_: None,
    )
    content = json.loads((tmp_path / "out/profile.json").read_text())
    return ProfileResult.from_json(content)


def works(*broken: tuple[str, str]) -> dict[str, str]:
    whole = {f"{m}/{k}": "write" for m in ("teacher", "width") for k in (0, 1)}
    return whole | dict(broken)


def test_models_in_turns(models: list[ModelUnderTest], tmp_path: Path) -> None:
    result = measure(models, tmp_path, kinds=works())
    order = [Path(line).parent.name for line in (tmp_path / "order").read_text().splitlines()]
    assert order == ["teacher-0", "width-0", "width-1", "teacher-1"]
    (speedup,) = result.speedups
    assert (speedup.model, speedup.ratio, speedup.pairs) == ("width", 1.0, 2)
    (measured,) = result.measurements["width"]
    assert (measured.repeats, measured.output_len, measured.load) == (2, 16, 8)
    assert result.method["warmup"] == 1
    assert result.hardware["cores"]
    raw = sorted(p.name for p in (tmp_path / "out/raw").iterdir())
    assert raw == ["teacher-1.json", "teacher-2.json", "width-1.json", "width-2.json"]
    assert (tmp_path / "out/raw/width-1.json").read_text() == (
        DATA / "vllm-throughput.json"
    ).read_text()


def test_a_tool_that_fails_in_the_middle(models: list[ModelUnderTest], tmp_path: Path) -> None:
    with pytest.raises(ProfileStopped) as stopped:
        measure(models, tmp_path, kinds=works(("teacher/1", "fail")))
    assert stopped.value.exit_code == 4
    assert "vllm-throughput exited with 3" in str(stopped.value)
    assert "out of paper" in str(stopped.value)
    assert not (tmp_path / "out").exists()
    partial = ProfileResult.from_json(json.loads((tmp_path / "out-incomplete.json").read_text()))
    assert partial.incomplete is not None
    assert [m.repeats for m in partial.measurements["width"]] == [2]
    assert [m.repeats for m in partial.measurements["teacher"]] == [1]


def test_a_tool_that_writes_nothing(models: list[ModelUnderTest], tmp_path: Path) -> None:
    with pytest.raises(ParetronError, match=r"wrote no result\.json") as failed:
        measure(models, tmp_path, kinds=works(("teacher/0", "nothing")))
    assert "working on it" in str(failed.value)
    assert not (tmp_path / "out-incomplete.json").exists()


def test_a_tool_that_takes_too_long_ends_with_its_children(tmp_path: Path) -> None:
    program = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "open('child', 'w').write(str(child.pid)); print('waiting'); time.sleep(600)\n"
    )
    began = time.monotonic()
    with pytest.raises(ParetronError, match="took longer than 3 s") as failed:
        run_tool(
            [str(HERE), "-u", "-c", program],
            name="slow",
            environment=dict(os.environ),
            folder=tmp_path,
            timeout_s=3,
        )
    assert time.monotonic() - began < 30
    assert failed.value.problems[0].code is Code.ENGINE
    assert "waiting" in str(failed.value)
    assert not alive(int((tmp_path / "child").read_text()))


def test_a_tool_ends_when_we_are_killed(tmp_path: Path) -> None:
    tool = "open('tool', 'w').write(str(__import__('os').getpid())); __import__('time').sleep(600)"
    ours = (
        "import os, sys\nfrom pathlib import Path\n"
        "from paretron_profiling.bench.run import run_tool\n"
        f"run_tool([sys.executable, '-c', {tool!r}], name='t', environment=dict(os.environ),"
        " folder=Path(sys.argv[1]), timeout_s=600)\n"
    )
    started = tmp_path / "tool"
    with subprocess.Popen([sys.executable, "-c", ours, str(tmp_path)]) as process:
        try:
            deadline = time.monotonic() + 60
            while not (started.is_file() and started.read_text()) and time.monotonic() < deadline:
                time.sleep(0.05)
        finally:
            process.kill()
    assert not alive(int(started.read_text()))


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not yet waited for does not."""
    for _ in range(100):
        with suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.05)
                continue
        return False
    return True


def test_what_a_run_asks_for() -> None:
    latency, serve = TOOLS[vllm_bench.LATENCY], TOOLS[vllm_bench.SERVE]
    batch = Settings(tool="x", mode="offline", load=4)
    assert (requests_of(batch, latency), requests_of(batch, serve)) == (32, 4)
    loop = Settings(tool="x", mode="closed", load=8)
    assert requests_of(loop, serve) == 64
    assert requests_of(loop.model_copy(update={"requests": 10}), serve) == 10
    assert requests_of(Settings(tool="x", mode="open", load=500), serve) == 32


def test_what_a_tool_cannot_do(models: list[ModelUnderTest], tmp_path: Path) -> None:
    def refused(tool: str, **settings: Any) -> str:
        with pytest.raises(ParetronError) as error:
            driven(
                models[:1],
                tool=replace(TOOLS[tool], executable=HERE.name),
                python=HERE,
                settings=Settings.model_validate({"tool": tool, "load": 2.0} | settings),
                served=None,
                scratch=tmp_path,
                on_event=lambda *_: None,
            )
        return str(error.value)

    assert "does not measure a load that is open" in refused("vllm-throughput", mode=OPEN)
    said = refused("trtllm-throughput", mode=CLOSED, requests=2)
    assert "2 requests with 2 in flight are all sent at once" in said
    assert "below 10000, and the model knows 320" in refused("vllm-latency", mode=OFFLINE)
    said = refused("vllm-throughput", mode=OFFLINE, input_len=500)
    assert "more than the 512 that teacher can hold" in said
    with pytest.raises(ParetronError, match="no aiperf beside") as missing:
        TOOLS["aiperf"].found(tmp_path / "python")
    assert missing.value.problems[0].code is Code.OPTIONAL_MISSING
    with pytest.raises(ParetronError, match="no interpreter that has vLLM"):
        TOOLS["vllm-serve"].found(HERE)


def test_an_engine_that_is_no_server(models: list[ModelUnderTest], tmp_path: Path) -> None:
    with pytest.raises(ParetronError, match="ortgenai is no server"):
        driven(
            models[:1],
            tool=replace(TOOLS["vllm-serve"], executable=HERE.name),
            python=HERE,
            settings=Settings(tool="vllm-serve", mode="closed", load=1, input_len=8, output_len=8),
            served=Served(ORTGENAI, EngineSettings(name="ortgenai")),
            scratch=tmp_path,
            on_event=lambda *_: None,
        )


def test_vllm_throughput_for_real(
    vllm_python: Path, models: list[ModelUnderTest], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as ended:
        main([
            "bench", "vllm-throughput", f"teacher={models[0].folders['hf']}",
            "--python", str(vllm_python), "--batch", "4", "--input-len", "32", "--output-len", "8",
            "--repeats", "1", "-o", str(out), "-q",
        ])  # fmt: skip
    assert not ended.value.code
    found = ProfileResult.from_json(json.loads((out / "profile.json").read_text()))
    (measured,) = found.measurements["teacher"]
    raw = json.loads((out / "raw/teacher-1.json").read_text())
    assert measured.output_tok_s == pytest.approx(4 * 8 / raw["elapsed_time"])
    assert raw["num_requests"] == 4
    assert abs(raw["total_num_tokens"] - 4 * 40) <= 8
    assert found.engines["vllm_bench_throughput"]["vllm"]
