"""Group E, profiling: what makes a speed doubtful is said, and `--strict` will not have it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from faults.conftest import Cli
from makers import PicoMaker
from paretron.errors import Code, ParetronError, Problem
from paretron.run import measure as stage
from paretron_profiling import gpu, measure
from paretron_profiling.gpu import Reading, Watch
from paretron_profiling.schema import FLAGS, OFFLINE, Sample

SOUND = ("--repeats", "3", "--warmup", "1", "--min-seconds", "1")


class Clockwork:
    """An engine whose answers take exactly the times it was given, one after the other."""

    name, wants, session_bytes, largest_batch, pid = "transformers", "hf", 0, None, None
    modes = frozenset({OFFLINE})
    about: Mapping[str, str] = {"version": "0"}

    def __init__(self, seconds: Sequence[float], *, dies_at: int | None = None) -> None:
        self.seconds, self.dies_at, self.answers = seconds, dies_at, 0

    def check(self, settings: object) -> list[Problem]:
        return []

    @contextmanager
    def open(self, model_dir: Path, **settings: object) -> Iterator[Clockwork]:
        yield self

    def generate(self, prompts: list[list[int]], output_len: int) -> Sample:
        if self.answers == self.dies_at:
            raise ParetronError(Problem(Code.ENGINE, "killed by signal 9", fix="more memory"))
        took = self.seconds[self.answers % len(self.seconds)]
        self.answers += 1
        times = [took * (k + 1) / output_len for k in range(output_len)]
        return Sample.in_lockstep(times, tokens=[[3] * output_len] * len(prompts))


def stranger_on_the_gpu() -> Watch:
    """A process that is none of ours, and exists everywhere: the first."""
    return Watch(lambda: Reading(0.0, 100.0, 1500.0, pids=frozenset({1})))


def hot_gpu() -> Watch:
    return Watch(lambda: Reading(0.0, 100.0, 900.0, throttled=True))


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine at rest, and no probe of it: neither is what these rows are about."""

    def no_probe() -> None:
        raise ParetronError(Problem(Code.ENGINE, "no probe here", fix="none"))

    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr(measure, "probe_device", no_probe)
    monkeypatch.setattr(gpu, "find_watch", lambda: None)


def use(engine: Clockwork, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (measure, stage):
        monkeypatch.setattr(module, "find_plugin", lambda group, name, *, where: engine)


# The row's fault -> options that differ, the engine's seconds, the GPU, the load, the flag.
DOUBTS: dict[str, tuple[tuple[str, ...], list[float], Any, float, str | None]] = {
    "E9-nothing": ((), [0.5], None, 0.0, None),
    "E9-repeats": (("--repeats", "2"), [0.5], None, 0.0, "few_repeats"),
    "E9-warmup": (("--warmup", "0"), [0.5], None, 0.0, "no_warmup"),
    "E9-spread": ((), [0.5, 0.53], None, 0.0, "noisy"),
    "E9-short": (("--min-seconds", "0"), [0.3], None, 0.0, "short"),
    "E9-shared": ((), [0.5], stranger_on_the_gpu, 0.0, "gpu_shared"),
    "E9-throttled": ((), [0.5], hot_gpu, 0.0, "throttled"),
    "E9-busy": ((), [0.5], None, 1e4, "busy"),
}


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("row", DOUBTS)
def test_a_doubtful_speed_is_flagged(
    row: str, cli: Cli, pico: PicoMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed, seconds, watch, load, flag = DOUBTS[row]
    use(Clockwork(seconds), monkeypatch)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    if watch is not None:
        monkeypatch.setattr(gpu, "find_watch", watch)
    command = ("profile", f"teacher={pico()}", "--engine", "transformers", "--input-len", "8",
               "--output-len", "4", *SOUND, *changed)  # fmt: skip
    assert cli(*command, "--out", tmp_path / "plain").code == 0
    outcome = cli(*command, "--out", tmp_path / "out", "--strict")
    (found,) = json.loads((tmp_path / "out/profile.json").read_text())["models"]["teacher"]
    assert found["flags"] == ([flag] if flag else [])
    if flag is None:
        assert outcome.code == 0
        return
    assert outcome.code == Code.GATE_FLAGGED.exit == 5
    assert "teacher on transformers, offline 1, 8 + 4 tokens" in outcome.err
    assert FLAGS[flag] in outcome.err
    assert "  fix: " in outcome.err
    # The numbers are kept, whole, and carry the flag.
    assert cli("verify", tmp_path / "out").code == 0


@pytest.mark.usefixtures("quiet")
def test_e8_what_was_measured_until_then_is_kept(
    cli: Cli, pico: PicoMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Trials of both, a warm-up of the teacher and of the student at two batches, and in the first
    # round the student's second batch is one too many.
    use(Clockwork([0.5], dies_at=2 + 3 + 2), monkeypatch)
    models = (f"teacher={pico()}", f"width={pico(name='width', intermediate_size=64)}")
    command = ("profile", *models, "--engine", "transformers", "--input-len", "8")
    outcome = cli(*command, "--output-len", "4", "--out", tmp_path / "out")
    assert outcome.code == Code.ENGINE.exit == 4
    assert "killed by signal 9" in outcome.err
    assert not (tmp_path / "out").exists()
    kept = json.loads((tmp_path / "out-incomplete.json").read_text())
    assert kept["incomplete"] == "killed by signal 9"
    repeats = {name: [m["repeats"] for m in found] for name, found in kept["models"].items()}
    assert repeats == {"teacher": [1], "width": [1]}
