"""Trainings of several phases, and of batches that change, with real processes."""

from __future__ import annotations

import contextlib
import json
import signal
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paretron.data.order import window_id
from paretron.data.store import TokenStore
from paretron.distill.batches import Batch, Windows
from paretron.distill.losses import IGNORE
from paretron.distill.memory import memory_explained
from paretron.distill.stage import train
from paretron.errors import Code, ParetronError
from paretron.recipe import Distill
from trainingprocess import content, elsewhere, end_of, signal_at

Arguments = Callable[..., dict[str, Any]]
PHASES: list[dict[str, Any]] = [
    {"seq_len": 16, "tokens": 5 * 8 * 16},
    {"seq_len": 64, "tokens": 5 * 4 * 64, "global_batch": 4, "micro_batch": 1, "lr": 1e-3},
]


def phased(given: dict[str, Any], **changes: Any) -> dict[str, Any]:
    settings = given["settings"].model_dump(exclude={"tokens", "phases"})
    stated = settings | {"phases": PHASES} | changes
    return given | {"settings": Distill.model_validate(stated)}


def steps(out: Path) -> list[dict[str, float]]:
    found: list[dict[str, float]] = json.loads((out / "metrics.json").read_text())["train"]
    return found


def stop_after(step: int) -> Callable[[str, Mapping[str, Any]], None]:
    def on_event(kind: str, fields: Mapping[str, Any]) -> None:
        if kind == "step" and fields["step"] == step:
            raise KeyboardInterrupt

    return on_event


def test_a_kill_on_either_side_of_a_phase_changes_nothing(
    arguments: Arguments, tmp_path: Path
) -> None:
    given = phased(arguments(steps=1, checkpoint_every=1, eval_every=4, validate=True))
    assert end_of(given, tmp_path)[0] == 0
    made = steps(given["out"])
    assert [step["phase"] for step in made] == [0] * 5 + [1] * 5
    assert [step["tokens"] for step in made] == [
        *range(128, 641, 128), *range(640 + 256, 640 + 1281, 256),
    ]  # fmt: skip
    assert made[5]["lr"] == 1e-3
    for last in (3, 7):
        killed = elsewhere(given, f"killed-{last}")

        def reached(message: dict[str, Any], last: int = last) -> bool:
            return message.get("event") == "step" and message["fields"]["step"] == last

        assert signal_at(killed, tmp_path, reached, signal.SIGKILL)[0] == -signal.SIGKILL
        assert not killed["out"].exists()
        code, said = end_of(killed, tmp_path)
        assert code == 0
        assert "resumed after step" in str(said)
        assert content(killed["out"]) == content(given["out"])


def test_a_training_goes_on_with_another_batch_and_reads_on(
    arguments: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(steps=8, checkpoint_every=1, on_event=stop_after(3))
    with pytest.raises(KeyboardInterrupt):
        train(**given)
    notes: list[str] = []
    read: list[int] = []
    plain = Windows.batch

    def watch(kind: str, fields: Mapping[str, Any]) -> None:
        if kind == "note":
            notes.append(fields["message"])

    def spied(self: Windows, window_ids: Sequence[int]) -> Batch:
        if len(window_ids) == 16:  # a step's; preflight looks at fewer
            read.extend(window_ids)
        return plain(self, window_ids)

    monkeypatch.setattr(Windows, "batch", spied)
    larger = given["settings"].model_copy(update={"global_batch": 16, "micro_batch": 2})
    train(**given | {"settings": larger, "on_event": watch})
    points: list[dict[str, Any]] = [{"tokens": 0}, *steps(given["out"])]
    sizes = [b["tokens"] - a["tokens"] for a, b in pairwise(points)]
    resumed = sizes.index(512)
    assert sizes == [256] * resumed + [512] * ((8 - resumed) // 2)
    assert f"from step {resumed + 1} on 512 tokens a step, 256 before" in notes
    windows = TokenStore.open(given["train_tokens"]).windows(32)
    unread = range(8 * resumed, 8 * resumed + 16 * ((8 - resumed) // 2))
    assert read == [window_id(k, num_windows=windows, seed=7) for k in unread]


@pytest.mark.parametrize("apart", [False, True], ids=["joined", "apart"])
def test_a_training_goes_on_in_windows_of_other_lengths_and_reads_on(
    arguments: Arguments, monkeypatch: pytest.MonkeyPatch, apart: bool
) -> None:
    """32 tokens, then 64, then 16; eight tokens in a row tell where in the text they stand."""
    given = arguments(steps=12, checkpoint_every=1) | {"apart": apart}
    file = given["train_tokens"] / "tokens-00000.bin"
    count = file.stat().st_size // 2
    np.random.default_rng(0).integers(3, 300, count).astype("<u2").tofile(file)
    store = TokenStore.open(given["train_tokens"])
    notes: list[str] = []
    batches: list[tuple[int, Batch]] = []
    plain = Windows.batch

    def spied(self: Windows, window_ids: Sequence[int]) -> Batch:
        batch = plain(self, window_ids)
        if len(window_ids) == 8:  # a step's; preflight looks at fewer
            batches.append((self.seq_len, batch))
        return batch

    monkeypatch.setattr(Windows, "batch", spied)
    for seq_len, last in ((32, 3), (64, 5), (16, 100)):

        def watch(kind: str, fields: Mapping[str, Any], last: int = last) -> None:
            if kind == "note":
                notes.append(fields["message"])
            if kind == "step" and fields["step"] == last:
                raise StopIteration

        with contextlib.suppress(StopIteration):
            train(**given | {"seq_len": seq_len, "on_event": watch})
    made = steps(given["out"])
    lengths = [step["seq_len"] for step in made]
    counts = {length: lengths.count(length) for length in (32, 64, 16)}
    assert lengths == [32] * counts[32] + [64] * counts[64] + [16] * counts[16]
    assert min(counts.values()) > 0
    assert made[-1]["tokens"] == 12 * 8 * 32  # as many as if nothing had changed
    assert any("on windows of 64 tokens, 32 before" in note for note in notes)
    # The steps that were kept have read no place twice, and those are places of the text.
    read: Counter[int] = Counter()
    at = {tuple(store.tokens(k, 8).tolist()): k for k in range(store.num_tokens - 8)}
    assert len(at) == store.num_tokens - 8
    left = dict(counts)
    for length, batch in batches:
        if not left[length]:  # of a step that was not saved
            continue
        left[length] -= 1
        for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
            follows = labels[:-1] != IGNORE
            assert torch.equal(labels[:-1][follows], ids[1:][follows])
            for first in range(0, length, 8):
                place = at.get(tuple(ids[first : first + 8].tolist()))
                if place is not None:
                    read.update(range(place, place + 8))
    assert len(read) > 0.8 * 12 * 8 * 32  # the others hold a seam
    assert max(read.values()) == 1


def test_lengths_of_stated_phases_stay(arguments: Arguments) -> None:
    given = phased(arguments(steps=1, checkpoint_every=1, on_event=stop_after(2)))
    with pytest.raises(KeyboardInterrupt):
        train(**given)
    longer = [PHASES[0] | {"seq_len": 32}, PHASES[1]]
    with pytest.raises(ParetronError, match=r"training\.phases was"):
        train(**phased(given, phases=longer))


def test_documents_apart_train_and_are_known_by_their_checkpoints(arguments: Arguments) -> None:
    given = arguments(steps=3)
    train(**given)
    apart = elsewhere(given, "apart") | {"apart": True}
    train(**apart)
    assert [s["loss"] for s in steps(given["out"])] != [s["loss"] for s in steps(apart["out"])]
    with pytest.raises(ParetronError, match="apart was False"):
        train(**given | {"apart": True, "out": given["out"].with_name("third")})


@pytest.mark.parametrize("bound", [{}, {"phases": [{"seq_len": 32, "tokens": 256}]}])
def test_out_of_memory_advises_only_what_goes_on(bound: dict[str, Any]) -> None:
    """Windows of stated phases cannot change under way, others can."""
    settings = Distill.model_validate({"tokens": 256, "global_batch": 8, **bound})
    with (
        pytest.raises(ParetronError) as caught,
        memory_explained(settings, state_bytes=1, peak_bytes=lambda: 2),
    ):
        raise MemoryError
    (problem,) = caught.value.problems
    assert problem.code is Code.MEMORY
    assert ("a shorter seq_len" in problem.fix) == (not bound)
