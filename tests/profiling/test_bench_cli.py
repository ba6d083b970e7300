"""`paretron bench --from`: result files made elsewhere, published as a profile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paretron.cli.main import main
from paretron_profiling.result import ProfileResult
from paretron_profiling.schema import FEW_REPEATS, NO_WARMUP

DATA = Path(__file__).with_name("data") / "bench"
PLAIN, DETAILED = DATA / "vllm-serve-plain.json", DATA / "vllm-serve-detailed.json"


def ended(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as done:
        main(["bench", *map(str, arguments)])
    return int(done.value.code or 0)


def profile(folder: Path) -> ProfileResult:
    content: dict[str, Any] = json.loads((folder / "profile.json").read_text())
    return ProfileResult.from_json(content)


def test_files_become_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    files = [f"teacher={PLAIN}", f"teacher={DETAILED}", f"width={DETAILED}"]
    given = [part for file in files for part in ("--from", file)]
    assert ended("vllm-serve", *given, "-o", out) == 0
    assert capsys.readouterr().out.strip() == str(out / "profile.json")
    found = profile(out)
    (teacher,), (width,) = found.measurements["teacher"], found.measurements["width"]
    stated = [json.loads(p.read_text()) for p in (PLAIN, DETAILED)]
    assert teacher.repeats == 2
    # One of them has no raw times: both count by what they state, the second by its raw times.
    assert teacher.samples == ()
    assert teacher.intervals["ttft_ms"] == pytest.approx(
        sorted(s["median_ttft_ms"] for s in stated)
    )
    assert (width.repeats, len(width.samples)) == (1, 1)
    (speedup,) = found.speedups
    assert (speedup.pairs, speedup.coverage) == (0, 0.0)
    assert speedup.ratio == speedup.interval[0] == speedup.interval[1]
    assert teacher.output_tok_s is not None
    assert width.output_tok_s is not None
    assert speedup.ratio == pytest.approx(width.output_tok_s / teacher.output_tok_s)
    assert speedup.parts["ttft_ms"].ratio == pytest.approx(
        (teacher.ttft_ms or 0) / (width.ttft_ms or 1)
    )
    assert FEW_REPEATS in speedup.flags
    assert NO_WARMUP not in speedup.flags
    assert found.method["warmup"] is None
    assert found.hardware == {"cpu": "a machine that the files do not name"}
    assert (out / "raw/teacher-1.json").read_bytes() == PLAIN.read_bytes()
    with pytest.raises(SystemExit) as verified:
        main(["verify", str(out)])
    assert not verified.value.code


def test_records_are_kept_too(tmp_path: Path) -> None:
    folder = DATA / "aiperf"
    file = folder / "profile_export_aiperf.json"
    assert ended("aiperf", "--from", f"teacher={file}", "-o", tmp_path / "out") == 0
    kept = (tmp_path / "out/raw/teacher-1.jsonl").read_bytes()
    assert kept == (folder / "profile_export.jsonl").read_bytes()
    assert profile(tmp_path / "out").engines["aiperf"]["version"] == "0.13.0"


def test_what_files_leave_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = f"teacher={DATA / 'vllm-latency.json'}"
    assert ended("vllm-latency", "--from", file, "-o", tmp_path / "out") == 2
    assert "--output-len" in capsys.readouterr().err
    said = ["--batch", "4", "--input-len", "64", "--output-len", "16", "--warmup", "0"]
    assert ended("vllm-latency", "--from", file, "-o", tmp_path / "out", *said) == 0
    (measured,) = profile(tmp_path / "out").measurements["teacher"]
    assert (measured.load, measured.repeats) == (4, 5)
    assert NO_WARMUP in measured.flags


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("sglang", "--from", f"a={PLAIN}"), 2, "one of vllm-serve, vllm-throughput"),
        (("vllm-serve",), 2, "either checkpoints to measure, or result files"),
        (("vllm-serve", "a=.", "--from", f"a={PLAIN}"), 2, "either checkpoints to measure"),
        (("vllm-serve", "--from", "a=nothing.json"), 2, "is not NAME=FILE"),
        (("vllm-serve", "--from", f"../a={PLAIN}"), 2, "is not NAME=FILE"),
        (("vllm-serve", "--from", f"a={PLAIN}", "--concurrency", "5"), 3, "closed 5 was asked"),
        (("vllm-serve", "--from", f"a={PLAIN}", "--input-len", "128"), 3, "128 were asked for"),
        (("aiperf", "--from", f"a={PLAIN}"), 3, "this is no result file of aiperf"),
        (
            ("vllm-serve", "--from", f"a={PLAIN}", "--batch", "1", "--rate", "2"),
            2,
            "one load at a time",
        ),
        (("vllm-serve", "a=."), 2, "needs an interpreter"),
        (("vllm-serve", "a=.", "--python", "python"), 2, "needs a load"),
        (("vllm-serve", "a=.", "--python", "python", "--rate", "0"), 2, "load: Input should be"),
        (("vllm-serve", "a=.", "--python", "python", "--rate", "nan"), 2, "load: Input should be"),
        (
            ("vllm-throughput", "a=.", "--python", "python", "--batch", "1", "--engine", "vllm"),
            2,
            "loads the models itself",
        ),
    ],
)
def test_usage(
    arguments: tuple[str, ...],
    code: int,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ended(*arguments, "-o", tmp_path / "out") == code
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_there_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    assert ended("vllm-serve", "--from", f"a={PLAIN}", "-o", tmp_path / "out") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert ended("vllm-serve", "--from", f"a={PLAIN}", "-o", tmp_path / "out", "--overwrite") == 0
