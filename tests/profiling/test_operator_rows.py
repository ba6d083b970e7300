"""Operator tables from engines: exact by differences, measured for real, honest about gaps."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paretron.cli.main import main
from paretron.errors import Code, ParetronError
from paretron.families import Sizes
from paretron.recipe import Engine as EngineSettings
from paretron.recipe import Speed
from paretron.run import tabling
from paretron.search.space import Shapes
from paretron.search.table import OperatorTable, predicted_ms
from paretron_profiling.engines.engine import Limits
from paretron_profiling.models import ModelFacts, ModelUnderTest
from paretron_profiling.roofline.operators import EngineTimer, Timed, rows_of
from paretron_profiling.schema import Sample
from pico import make_pico

SPEED = Speed(ms=10.0, batch=2, lengths=(16, 8), repeats=3)
SIZE = {"hidden": 48, "ffn": 64, "kv_heads": 2, "q_per_kv": 2, "head_dim": 32, "vocab": 320}
FACTS = ModelFacts(320, 1, 1, 512, frozenset({0}))


class Clockwork:
    """An engine whose times are a law: a + b * layers, the more of it the later the run."""

    name, wants, session_bytes, largest_batch = "clockwork", "hf", 0, None

    def __init__(self, *, layer_s: float = 3e-3, drift: float = 0.0, fails: bool = False) -> None:
        self.layer_s, self.drift, self.fails, self.runs = layer_s, drift, fails, 0

    @contextmanager
    def open(
        self, folder: Path, *, settings: EngineSettings, limits: Limits
    ) -> Iterator[ClockworkSession]:
        """A session of a folder that is named for its layers."""
        assert (limits.batch, limits.context_len) == (2, 24)
        yield ClockworkSession(self, int(folder.name))


class ClockworkSession:
    """Answers as the law says."""

    def __init__(self, engine: Clockwork, layers: int) -> None:
        self._engine, self._layers = engine, layers

    @property
    def about(self) -> Mapping[str, str]:
        """Where it says that it runs."""
        return {"device": "cpu", "threads": "1"}

    def generate(self, prompts: Sequence[Sequence[int]], output_len: int) -> Sample:
        """Prefill takes ten times a step."""
        self._engine.runs += 1
        slower = 1 + self._engine.drift * self._engine.runs
        step = slower * (1e-3 + self._engine.layer_s * self._layers)
        times = [10 * step + k * step for k in range(output_len)]
        sample = Sample.in_lockstep(times, tokens=[[0] * output_len] * len(prompts))
        if self._engine.fails:
            return Sample((0.0,), (1.0,), (2.0,), (), failures=("gone",))
        return sample


def timer(engine: Clockwork) -> EngineTimer:
    @contextmanager
    def made(size: Sizes, layers: int) -> Iterator[ModelUnderTest]:
        assert size == SIZE
        yield ModelUnderTest("random", "random", {"hf": Path(str(layers))}, FACTS)

    return EngineTimer(engine, EngineSettings(name="clockwork"), SPEED, made)  # type: ignore[arg-type]


def test_layer_and_ends_come_out_exactly() -> None:
    rows = rows_of([timer(Clockwork()).timed(SIZE)], SPEED)
    found = {(r.part, r.phase): r for r in rows}
    assert found["layer", "decode"].seconds == pytest.approx(3e-3)
    assert found["layer", "prefill"].seconds == pytest.approx(3e-2)
    assert found["ends", "decode"].seconds == pytest.approx(1e-3)
    assert found["ends", "prefill"].seconds == pytest.approx(1e-2)
    assert found["layer", "decode"].sizes == {a: n for a, n in SIZE.items() if a != "vocab"}
    assert found["ends", "decode"].sizes == {"hidden": 48, "vocab": 320}
    assert {(r.context, r.batch, r.repeats) for r in rows} == {(16, 2, 3), (20, 2, 3)}
    # Read back, a model of 7 layers takes what the law says.
    table = OperatorTable(
        engine="clockwork", device="x", dtype="float32", model_type="llama", rows=rows
    )
    shape = Shapes({axis: np.array([n]) for axis, n in {**SIZE, "layers": 7}.items()})
    assert predicted_ms(table, shape, SPEED)[0] == pytest.approx(1e3 * 17 * (1e-3 + 7 * 3e-3))


def test_a_machine_that_slows_down_favours_neither_model() -> None:
    """Whoever goes first in one pair goes second in the next: a steady drift cancels."""
    even = replace(timer(Clockwork(drift=0.01)), speed=SPEED.model_copy(update={"repeats": 4}))
    seconds = even.timed(SIZE).layer_s["decode"]
    middle = sum(seconds) / len(seconds)
    mean_slowdown = 1 + 0.01 * (3 + 10) / 2  # of runs 3 to 10, the first two warm up
    assert middle == pytest.approx(3e-3 * mean_slowdown, rel=0.01)


def test_what_noise_hides_is_unknown() -> None:
    rows = rows_of([timer(Clockwork(layer_s=-1e-5)).timed(SIZE)], SPEED)
    assert {r.seconds for r in rows if r.part == "layer"} == {None}
    assert all(r.seconds for r in rows if r.part == "ends")


def test_a_shape_that_was_not_run_is_a_gap() -> None:
    good, wide = timer(Clockwork()).timed(SIZE), {**SIZE, "ffn": 96}
    rows = rows_of([good, Timed.failed(wide)], SPEED)
    assert [r.seconds is None for r in rows if r.part == "layer"] == [False, True] * 2
    assert all(r.seconds for r in rows if r.part == "ends")  # seen with the other shape
    assert Timed.from_json(json.loads(json.dumps(good.to_json()))) == good


def test_requests_that_fail_are_no_time() -> None:
    with pytest.raises(ParetronError, match="1 of 2 requests") as caught:
        timer(Clockwork(fails=True)).timed(SIZE)
    assert caught.value.problems[0].code is Code.ENGINE


RECIPE = """\
schema: 1
teacher: {model: ./model}
data:
  calibration: {corpus: stdlib, part: calibration, seq_len: 64}
  train: {corpus: stdlib, part: train, seq_len: 64}
  validation: {corpus: stdlib, part: validation, seq_len: 64, tokens: 640}
students:
  best:
    search:
      space: {ffn: MLPS, layers: [2, 3, 4]}
      budget: {speed: {engine: ENGINE, table: ENGINE.json, batch: 2, lengths: [16, 8], ms: 1000,
                       repeats: 2}}
      rounds: []
distill: {tokens: 1.0e5, global_batch: 8}
"""
SPACES = {"ortgenai": [64], "transformers": [64, 80]}  # an export takes seconds


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher and a recipe for each engine."""
    root = tmp_path_factory.mktemp("table")
    make_pico(root / "model")
    for engine, mlps in SPACES.items():
        text = RECIPE.replace("ENGINE", engine).replace("MLPS", str(mlps))
        (root / f"{engine}.yaml").write_text(text)
    return root


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


@pytest.mark.parametrize("engine", ["ortgenai", "transformers"])
def test_a_table_is_measured_and_planned_with(
    engine: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    recipe = place / f"{engine}.yaml"
    code, out, _ = run(capsys, "plan", recipe)
    assert code in (2, 3)  # it names a table that is not there
    code, out, err = run(capsys, "table", recipe, "--json")
    assert (code, err) == (0, "")
    table = OperatorTable.model_validate(json.loads(out)["table"])
    assert table == OperatorTable.load(place / f"{engine}.json")
    assert (table.engine, table.dtype, table.model_type) == (engine, "float32", "llama")
    assert "CPU" in table.device or "thread" in table.device
    assert ("export" in table.versions) == (engine == "ortgenai")
    assert len(table.rows) == 2 * (len(SPACES[engine]) + 1)  # and one pair of ends
    # Noise may hide what so small a layer takes: then its row says so, but it was measured.
    assert all(r.spread is not None and r.spread > 0 and r.repeats >= 2 for r in table.rows)
    assert sorted(p.name for p in place.glob(".*.journal")) == []
    code, out, _ = run(capsys, "plan", recipe, "--json")
    found: dict[str, Any] = json.loads(out)
    assert [p for p in found["problems"] if "table" in p["where"]] == []
    assert run(capsys, "table", recipe)[0] == 2  # it is there already


def test_what_was_measured_is_kept(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped behind the first shape; the same command measures the second alone."""
    monkeypatch.chdir(place)
    measured: list[Sizes] = []
    real = EngineTimer.timed

    def stopping(self: EngineTimer, size: Sizes) -> Timed:
        if len(measured) == 1:
            raise KeyboardInterrupt
        measured.append(size)
        return real(self, size)

    command = ("table", place / "transformers.yaml", "--out", place / "again.json", "--quiet")
    monkeypatch.setattr(EngineTimer, "timed", stopping)
    assert run(capsys, *command)[0] == 75
    assert not (place / "again.json").exists()

    def noting(self: EngineTimer, size: Sizes) -> Timed:
        measured.append(size)
        return real(self, size)

    monkeypatch.setattr(EngineTimer, "timed", noting)
    assert run(capsys, *command)[0] == 0
    assert [size["ffn"] for size in measured] == [64, 80]
    rows = OperatorTable.load(place / "again.json").rows
    assert {r.sizes["ffn"] for r in rows if r.part == "layer"} == {64, 80}


def test_a_shape_that_the_engine_refuses_is_said(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    real = EngineTimer.timed

    def picky(self: EngineTimer, size: Sizes) -> Timed:
        if size["ffn"] == 80:
            raise ParetronError(tabling.Problem(Code.ENGINE, "no kernel for 80"))
        return real(self, size)

    monkeypatch.setattr(EngineTimer, "timed", picky)
    out = place / "gap.json"
    code, _, err = run(capsys, "table", place / "transformers.yaml", "--out", out)
    assert code == 0
    assert "no kernel for 80" in err
    layers = [r for r in OperatorTable.load(out).rows if r.part == "layer"]
    refused = [r for r in layers if r.sizes["ffn"] == 80]
    assert [(r.seconds, r.repeats) for r in refused] == [(None, 0)] * 2
    assert {r.repeats for r in layers if r.sizes["ffn"] == 64} == {2}
    monkeypatch.setattr(EngineTimer, "timed", lambda self, size: picky(self, {**size, "ffn": 80}))
    command = ("table", place / "transformers.yaml", "--out", place / "none.json")
    assert run(capsys, *command)[0] == 4
    assert not (place / "none.json").exists()


@pytest.mark.parametrize(
    ("change", "options", "code", "cause"),
    [
        ("", ["--student", "width"], 2, "does not search by speed"),
        ("search:=drop", [], 2, "no student of this recipe searches by speed"),
        ("table: transformers.json, =", [], 2, "names no table"),
        ("engine: transformers=engine: vllm", [], 2, "needs an interpreter"),
        ("engine: transformers=engine: abacus", [], 2, "no engine is called"),
        ("{model: ./model}={model: ./elsewhere}", [], 3, ""),
        ("", ["--out", "."], 2, "there already"),
        (
            "rounds: []=rounds: []\nprofile: {engines: [{name: vllm_server, servers: {x: http://x}}]}",
            ["--set", "students.best.search.budget.speed.engine=vllm_server"],
            6,
            "has one model",
        ),
    ],
)
def test_what_no_table_can_be_made_of(
    change: str,
    options: list[str],
    code: int,
    cause: str,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = (place / "transformers.yaml").read_text().replace("./model", str(place / "model"))
    before, _, after = change.replace("./model", str(place / "model")).partition("=")
    if after == "drop":
        head, _, tail = text.partition("  best:")
        text = f"{head}  best: {{ffn: 64}}\n{tail[tail.index('distill:') :]}"
    elif before:
        assert before in text
        text = text.replace(before, after)
    (tmp_path / "recipe.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    found, _, err = run(capsys, "table", tmp_path / "recipe.yaml", *options)
    assert found == code
    assert cause in err
    assert "Traceback" not in err


def test_a_teacher_that_is_not_there_yet(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "recipes", "show", "quickstart", "--json")
    text = json.loads(out)["text"]
    head, _, _ = text.partition("\nstudents:")
    (tmp_path / "recipe.yaml").write_text(
        f"{head}\nstudents: {{best: {{search: {{space: {{layers: [1]}}, rounds: [], "
        "budget: {speed: {ms: 9}}}}}\ndistill: {tokens: 1.0e5, global_batch: 8}\n"
    )
    code, _, err = run(capsys, "table", tmp_path / "recipe.yaml", "--out", tmp_path / "t.json")
    assert code == 6, err
    assert "makes its teacher" in err
