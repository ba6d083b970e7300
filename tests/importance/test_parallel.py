"""Real processes that share the samples: the scores of one process, of two, and streamed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from makers import PicoMaker
from paretron.artifacts.manifest import Provenance, verify
from paretron.data.tokens import build_token_store
from paretron.errors import Code, ParetronError
from paretron.importance.scores import Scores
from paretron.importance.stage import score_model
from paretron.recipe import Calibration, Score
from pico import pico_tokenizer


@pytest.fixture
def store(tmp_path: Path) -> Path:
    text = "the cat sat on the mat, and the dog ran after it; def main(self): return 1\n" * 40
    build_token_store([text], pico_tokenizer(), tmp_path / "store", eos_token_id=1)
    return tmp_path / "store"


def _score(
    model: Path, store: Path, out: Path, *, samples: int = 7, **settings: Any
) -> list[tuple[str, Any]]:
    events: list[tuple[str, Any]] = []

    def on_event(kind: str, fields: Mapping[str, object]) -> None:
        events.append((kind, dict(fields)))

    score_model(
        model,
        store,
        score=Score.model_validate({"micro_batch": 2, "depth": {"samples": 3}} | settings),
        calibration_settings=Calibration(path="unused.txt", samples=samples, seq_len=24),
        block_sizes=(2,),
        seed=5,
        out=out,
        provenance=Provenance(kind="scores"),
        state=out.with_name(f"{out.name}-state"),
        on_event=on_event,
    )
    return events


def _assert_same(one: Scores, other: Scores) -> None:
    assert (one.info.samples, one.info.tokens) == (other.info.samples, other.info.tokens)
    for axis in one.info.axes:
        for field in ("sums", "squares"):
            a, b = getattr(one.statistics[axis], field), getattr(other.statistics[axis], field)
            torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6 * float(a.max()))
        layers = [None] if axis == "hidden" else range(one.info.sizes["layers"])
        for layer in layers:
            ranks = [s.ranking(axis, layer, batch="l2", sequence="mean") for s in (one, other)]
            assert torch.equal(*ranks)
    for table in ("influence", "angular"):
        for n, values in getattr(one.info, table).items():
            assert getattr(other.info, table)[n] == pytest.approx(values, abs=1e-6)
    assert one.info.losses is not None
    assert other.info.losses is not None
    assert other.info.losses.baseline == pytest.approx(one.info.losses.baseline, abs=1e-5)
    for n, values in one.info.losses.blocks.items():
        assert other.info.losses.blocks[n] == pytest.approx(values, abs=1e-5)


def test_one_process_two_and_streamed_give_the_same_scores(
    pico: PicoMaker, store: Path, tmp_path: Path
) -> None:
    model = pico("qwen3", dtype="bfloat16")
    _score(model, store, tmp_path / "resident", placement="resident")
    whole = Scores.load(tmp_path / "resident")
    streamed = _score(model, store, tmp_path / "streamed", placement="streamed")
    parallel = _score(model, store, tmp_path / "parallel", placement="streamed", processes=2)
    for name, events in (("streamed", streamed), ("parallel", parallel)):
        verify(tmp_path / name)
        _assert_same(whole, Scores.load(tmp_path / name))
        assert "layer by layer" in events[0][1]["message"]
        assert sum(kind == "removal" for kind, _ in events) == 4 + 3 + 1


def test_under_a_torchrun_of_ones_own(pico: PicoMaker, store: Path, tmp_path: Path) -> None:
    """`torchrun -m paretron score`: one artifact, one path printed."""
    model = pico()
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog ran after it\n" * 200)
    recipe = tmp_path / "recipe.yaml"
    source = f"{{path: {text}, seq_len: 24}}"
    recipe.write_text(
        f"schema: 1\nteacher: {{model: {model}}}\n"
        f"data:\n  calibration: {{path: {text}, seq_len: 24, samples: 6}}\n"
        f"  train: {source}\n  validation: {source}\n"
        "students: {narrow: {ffn: 48}}\ndistill: {tokens: 9216, global_batch: 16}\n"
    )
    roots = [Path(__file__).parents[2] / r for r in ("toolkit", "exporters", "profiling")]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "paretron", "score", str(model), "--recipe", str(recipe),
        "--out", str(tmp_path / "scores"), "--quiet",
    ]  # fmt: skip
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, roots)),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "scores")
    assert Scores.load(tmp_path / "scores").info.samples == 6


def test_an_error_of_a_worker_is_the_callers(pico: PicoMaker, store: Path, tmp_path: Path) -> None:
    with pytest.raises(ParetronError) as caught:
        _score(pico(), store, tmp_path / "out", processes=2, samples=1)
    assert caught.value.problems[0].code is Code.USAGE
    assert not (tmp_path / "out").exists()
