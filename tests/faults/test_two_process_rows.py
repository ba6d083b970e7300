"""Group D: two real gloo processes against one, and what happens when one fails them."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.torch import load_file

from makers import PicoMaker
from paretron.artifacts.manifest import verify
from paretron.data.store import TokenStore
from paretron.distill.schedule import Place, Schedule
from paretron.distill.stage import train
from paretron.errors import Code, ParetronError

Arguments = Callable[..., dict[str, Any]]
SCRIPT = Path(__file__).parents[1] / "distill" / "two_ranks.py"


def two_ranks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("two_ranks", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-7)


def test_d13_two_processes_equal_one_with_unequal_valid_tokens(
    pico: PicoMaker, tokens: Path, tmp_path: Path
) -> None:
    pico("llama", name="student", seed=1, hidden_size=48, num_hidden_layers=2)
    pico("qwen3", name="tied", hidden_size=48, num_hidden_layers=2, tie_word_embeddings=True)
    pico("mixtral", name="experts", num_hidden_layers=2, num_local_experts=3)
    pico("llama", name="teacher", seed=2, num_hidden_layers=2)
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    script = two_ranks()
    script.main(tmp_path, one)
    subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            str(SCRIPT), str(tmp_path), str(two),
        ],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip
    for name in script.CASES:
        alone = json.loads((one / f"{name}.json").read_text())
        shared = json.loads((two / f"{name}.json").read_text())
        for split, keys in (("train", ("loss", "grad_norm", "lr")), ("validation", ("loss",))):
            assert len(alone[split]) == len(shared[split]) > 0
            for a, b in zip(alone[split], shared[split], strict=True):
                of_teacher = tuple(k for k in ("teacher_loss", "teacher_grad_norm") if k in a)
                assert all(close(a[k], b[k]) for k in keys + of_teacher), (name, split, a, b)
        weights = load_file(two / f"{name}.safetensors")
        for key, weight in load_file(one / f"{name}.safetensors").items():
            assert float((weight - weights[key]).abs().max()) < 2e-5, (name, key)


def workers() -> list[psutil.Process]:
    """The training processes below this one."""
    below = psutil.Process().children(recursive=True)
    return [p for p in below if "-m paretron.distill.worker" in " ".join(p.cmdline())]


def test_d1_d5_d6_d7_stopped_killed_and_resumed_they_end_where_undisturbed_ones_do(
    arguments: Arguments,
) -> None:
    heard: list[str] = []
    given = arguments(steps=60, processes=2, micro_batch=2, checkpoint_every=10, eval_every=25)
    whole = given | {"on_event": lambda kind, fields: heard.append(kind)}
    train(**whole)
    assert heard.count("step") == 60
    alone = json.loads((given["out"] / "metrics.json").read_text())

    parts = given | {
        "out": given["out"].with_name("parts"),
        "state": given["state"].with_name("parts-state"),
    }

    def at_step(step: int, action: Callable[[], None]) -> Callable[..., None]:
        def hear(kind: str, fields: Mapping[str, object]) -> None:
            if kind == "step" and fields["step"] == step:
                action()

        return hear

    def stop() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(ParetronError) as caught:
        train(**parts | {"on_event": at_step(5, stop)})
    assert caught.value.problems[0].code is Code.INTERRUPTED
    assert len(caught.value.problems) == 1
    assert not workers()
    (saved,) = parts["state"].glob("step-*")
    verify(saved)

    # D6: two processes' state goes on with one: the same numbers but for the order of additions.
    other = parts["settings"].model_copy(update={"processes": 1})
    shutil.copytree(parts["state"], parts["state"].with_name("one-state"))
    train(
        **parts
        | {
            "settings": other,
            "state": parts["state"].with_name("one-state"),
            "out": parts["out"].with_name("one"),
        }
    )
    one = json.loads((parts["out"].with_name("one") / "metrics.json").read_text())
    for a, b in zip(alone["train"], one["train"], strict=True):
        assert math.isclose(a["loss"], b["loss"], rel_tol=1e-5)

    def kill_one() -> None:
        [p.kill() for p in workers() if p.environ().get("RANK") == "1"]

    with pytest.raises(ParetronError) as caught:
        train(**parts | {"on_event": at_step(23, kill_one)})
    assert caught.value.problems[0].code is Code.DEVICE
    assert "signal" in caught.value.problems[0].cause.lower()
    assert not workers()
    assert not parts["out"].exists()
    newest = max(parts["state"].glob("step-*"))
    assert newest.name >= "step-000010"  # that of step 20 may have been on its way
    verify(newest)

    train(**parts)
    resumed = json.loads((parts["out"] / "metrics.json").read_text())
    assert resumed == alone
    assert verify(parts["out"])["files"] == verify(given["out"])["files"]
    assert not workers()


def test_d2_what_one_process_meets_is_told_once_with_its_rank(arguments: Arguments) -> None:
    given = arguments(steps=40, processes=2, micro_batch=2)
    schedule = Schedule.of(given["settings"], seq_len=given["seq_len"])
    store = TokenStore.open(given["train_tokens"])
    blocks = store.windows(schedule.block_len)
    window = schedule.window_ids(Place(), num_blocks=blocks, seed=given["seed"])[-1]
    shard = given["train_tokens"] / "tokens-00000.bin"
    ids = np.fromfile(shard, dtype="<u2")
    ids[window * given["seq_len"]] = 60_000
    ids.tofile(shard)
    with pytest.raises(ParetronError) as caught:
        train(**given)
    assert caught.value.exit_code == 3
    (problem,) = caught.value.problems
    assert problem.cause.startswith("on rank 1: the text holds token 60000")
    assert not workers()


def test_d18_a_process_that_stalls_ends_all_with_the_stack_of_each(arguments: Arguments) -> None:
    given = arguments(steps=4000, processes=2, micro_batch=2, stall_timeout_s=4)
    stopped: list[int] = []

    def stall_one(kind: str, fields: Mapping[str, object]) -> None:
        if kind == "step" and fields["step"] == 3:
            (victim,) = [p for p in workers() if p.environ().get("RANK") == "1"]
            victim.suspend()
            stopped.append(victim.pid)

    with pytest.raises(ParetronError) as caught:
        train(**given | {"on_event": stall_one})
    (problem,) = caught.value.problems
    assert problem.code is Code.DEVICE
    assert stopped
    assert not workers()
    assert "did not move for 4 seconds" in problem.cause
    # The one that was stopped from outside cannot speak; the one that waited for it does.
    stacks = (given["state"] / "stalled-rank-0.txt").read_text()
    assert "loop.py" in stacks
