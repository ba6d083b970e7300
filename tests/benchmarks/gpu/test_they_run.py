"""The GPU benchmarks at pico size on a CPU, so that they work where there is a GPU at last."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import fused_loss, profiling, scoring, training


@pytest.mark.parametrize("name", ["fused_loss", "profiling", "scoring", "training"])
def test_it_prints_what_it_measured(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    main, key = {
        "fused_loss": (fused_loss.main, "codes"),
        "profiling": (profiling.main, "profiles"),
        "scoring": (scoring.main, "score_s"),
        "training": (training.main, "tokens_per_s"),
    }[name]
    folder = ["--folder", str(tmp_path / "model")] if name in ("profiling", "scoring") else []
    engines = ["--engines", "transformers"] if name == "profiling" else []  # no minute of compiling
    monkeypatch.setattr(sys, "argv", [name, "--small", *folder, *engines])
    main()
    assert json.loads(capsys.readouterr().out)[key]
