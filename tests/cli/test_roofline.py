"""`roofline`: what a device could do, from config.json alone, in words and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from faults.conftest import run_and_measure
from paretron.cli.main import main
from published import LLAMA

SHAPES = {
    "teacher": {},
    "width": {"hidden_size": 3072, "intermediate_size": 9216},
    "depth": {"num_hidden_layers": 16},
}


@pytest.fixture
def named(tmp_path: Path) -> list[str]:
    """Llama-3.1-8B and its two 4B students, as folders that hold a config.json and nothing else."""
    for name, change in SHAPES.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(LLAMA | change))
    return [f"{name}={tmp_path / name}" for name in SHAPES]


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["roofline", *arguments])
    out = capsys.readouterr()
    return int(ended.value.code or 0), out.out, out.err


def test_it_is_light_and_needs_no_weights(named: list[str]) -> None:
    code, peak_kb, heavy = run_and_measure("roofline", *named, "--device", "H100")
    assert (code, heavy) == (0, [])
    assert peak_kb < 150_000


def test_the_8b_and_its_students_on_an_h100(
    named: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = said(
        capsys, *named, "--device", "H100", "--dtype", "fp8", "--kv-dtype", "fp8",
        "--batch", "1", "--batch", "32", "--batch", "32", "--json",
    )  # fmt: skip
    assert code == 0
    found: dict[str, Any] = json.loads(out)
    rows = {(r["model"], r["batch"]): r for r in found["rows"]}
    assert len(rows) == len(found["rows"]) == 6
    # 8.03 B parameters in one byte each, the head in two, the embedding not read: 2.4 ms.
    assert rows["teacher", 1]["decode"]["bound_s"] == pytest.approx(2.40e-3, rel=0.01)
    assert rows["teacher", 1]["decode"]["limited_by"] == "memory"
    assert rows["teacher", 32]["prefill"]["limited_by"] == "compute"
    caches = {n: rows[n, 32]["decode"]["parts"]["kv_s"] for n in SHAPES}
    assert caches["width"] == pytest.approx(caches["teacher"])
    assert caches["depth"] == pytest.approx(caches["teacher"] / 2)
    ratios = {(s["model"], s["rule"], s["teacher_batch"]): s for s in found["speedup"]}
    assert 1.7 < ratios["width", "same_batch", 1]["ratio"] < 1.9
    assert ratios["depth", "same_memory", 32]["batch"] > 32
    assert ratios["depth", "same_memory", 32]["ratio"] > ratios["depth", "same_batch", 32]["ratio"]


def test_in_words(named: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marked = f"[red]x[/nothing]={tmp_path / 'width'}"
    code, out, err = said(
        capsys, named[0], marked, "--device", "H100", "--batch", "4096", "--engine", "vllm"
    )
    assert (code, err) == (0, "")
    assert "too much" in out  # of the 80 GB
    assert "[red]x[/nothing]" in out
    assert "same batch, batch 4096 against 4096" in out
    assert "Launches are left out" in out
    _, out, _ = said(
        capsys, *named, "--device", "bandwidth=3e12,flops=1e15,launch=5e-6", "--engine", "vllm"
    )
    assert "launch" in out
    assert "left out" not in out


@pytest.mark.parametrize(
    ("arguments", "code", "cause"),
    [
        (["--device", "H1000"], 2, "no device called"),
        (["--device", "bandwidth=1e12"], 2, "needs its bandwidth and a rate"),
        (["--device", "H100", "--dtype", "fp3"], 2, "no format"),
        (["--device", "H100", "--engine", "abacus"], 2, "nobody counted"),
        (["--device", "H100", "teacher=elsewhere"], 2, "stands twice"),
        (["--device", "H100", "nameless"], 2, "not NAME=DIR"),
        (["--device", "H100", "x=/no/such/folder"], 3, "no such folder"),
        (["--device", "H100", "--batch", "0"], 2, "--batch"),
    ],
)
def test_what_cannot_be_said(
    arguments: list[str], code: int, cause: str, named: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    found, out, err = said(capsys, named[0], *arguments)
    assert (found, out) == (code, "")
    assert cause in err
    assert "Traceback" not in err
