"""Kills at chosen changes of a training's checkpoints: `python -m faults.kills --runs 100`."""

from __future__ import annotations

import argparse
import random
import signal
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paretron.artifacts.manifest import verify
from trainingprocess import content, elsewhere, end_of

# Changes of files in one save are fewer.
_CHANGES = 24


@dataclass(frozen=True)
class Kills:
    """How many processes were killed, how many trainings ended, and whether all ended alike."""

    kills: int
    trainings: int
    same: bool


def kill_runs(given: dict[str, Any], folder: Path, *, runs: int, seed: int = 0) -> Kills:
    """Kill a training at a random change of its checkpoints, again and again.

    After each kill every checkpoint that can be seen must verify, and none may be older than the
    newest before. A training that ends all the same begins anew.
    """
    assert end_of(given, folder)[0] == 0
    moments, kills, trainings, same, newest = random.Random(seed), 0, 0, True, ""
    for number in range(runs):
        killed = elsewhere(given, f"killed-{trainings}")
        code, _ = end_of(killed, folder, kill_at=moments.randint(1, _CHANGES))
        shown = sorted(killed["state"].glob("step-*"))
        for path in shown:
            verify(path)
        assert max((p.name for p in shown), default="") >= newest, number
        newest = max((p.name for p in shown), default="")
        kills += code == -signal.SIGKILL
        if code == 0:
            same &= content(killed["out"]) == content(given["out"])
            trainings, newest = trainings + 1, ""
    killed = elsewhere(given, f"killed-{trainings}")
    assert end_of(killed, folder)[0] == 0
    return Kills(kills, trainings + 1, same and content(killed["out"]) == content(given["out"]))


def main() -> None:
    """Kill trainings of a pico model."""
    from paretron.artifacts.models import load_tokenizer
    from paretron.data.tokens import build_token_store
    from pico import make_pico
    from picotraining import TEXTS, training_arguments

    options = argparse.ArgumentParser()
    options.add_argument("--runs", type=int, default=100)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for who, seed, hidden in (("student", 1, 48), ("teacher", 2, 64)):
            make_pico(folder / who, seed=seed, hidden_size=hidden, num_hidden_layers=2)
        tokenizer = load_tokenizer(folder / "teacher")
        build_token_store(TEXTS, tokenizer, folder / "tokens", eos_token_id=1)
        given = training_arguments(folder, steps=6, checkpoint_every=1)
        print(kill_runs(given, folder, runs=options.parse_args().runs))


if __name__ == "__main__":
    main()
