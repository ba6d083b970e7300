"""Tokenising is gone on with where a killed process left it, to the same bytes."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

import tokenprocess
from paretron.artifacts.journal import Journal
from paretron.data import tokens
from paretron.data.store import TokenStore
from pico import pico_tokenizer


class Counting:
    """A tokenizer that counts the characters it is asked about."""

    def __init__(self) -> None:
        self._tokenizer = pico_tokenizer()
        self.chars = 0

    def __call__(self, texts: list[str], **options: Any) -> Any:
        self.chars += sum(map(len, texts))
        return self._tokenizer(texts, **options)

    def get_vocab(self) -> dict[str, int]:
        return self._tokenizer.get_vocab()


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `tokenprocess.build` sets in its own processes is set back in this one."""
    for name in ("_BATCH_CHARS", "_PIECE_CHARS", "_SAVE_TOKENS"):
        monkeypatch.setattr(tokens, name, getattr(tokens, name))


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((folder / "store").iterdir())}


@pytest.mark.parametrize(("kind", "deaths"), [("plain", (40, 80)), ("mixed", (25, 60))])
def test_a_killed_build_goes_on_to_the_same_bytes(
    tmp_path: Path, kind: str, deaths: tuple[int, ...]
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    everything = Counting()
    tokenprocess.build(whole, kind, tokenizer=everything)
    assert len(list((whole / "store").glob("tokens-*.bin"))) > 2
    known = [0]
    for death in deaths:
        assert tokenprocess.killed_at(killed, kind, death) == -signal.SIGKILL
        assert not (killed / "store/tokens.json").exists()
        journal = Journal(killed / "journal.jsonl", of={"kind": kind})
        known.append(journal.known[("begun",)]["num_tokens"])
    assert known == sorted(set(known))  # each process got further than the one before
    rest = Counting()
    tokenprocess.build(killed, kind, tokenizer=rest)
    assert files(killed) == files(whole)
    share = 1 - known[-1] / TokenStore.open(whole / "store").num_tokens
    assert rest.chars < everything.chars * share * 1.1 + 1200  # two batches read ahead
    again = Counting()
    tokenprocess.build(killed, kind, tokenizer=again)
    assert again.chars == 0
    assert files(killed) == files(whole)


def test_of_a_plain_text_only_the_rest_is_tokenised(tmp_path: Path) -> None:
    assert tokenprocess.killed_at(tmp_path, "plain", 80) == -signal.SIGKILL
    journal = Journal(tmp_path / "journal.jsonl", of={"kind": "plain"})
    (position,) = journal.known[("begun",)]["positions"]
    assert 40 < position["documents"] < 80
    rest = Counting()
    tokenprocess.build(tmp_path, "plain", tokenizer=rest)
    unread = list(tokenprocess.documents(0, 100))[position["documents"] :]
    assert rest.chars == sum(map(len, unread))


def test_what_does_not_fit_its_journal_is_made_anew(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    tokenprocess.build(whole, "plain")
    assert tokenprocess.killed_at(killed, "plain", 80) == -signal.SIGKILL
    for damage in ("settings", "lost", "short"):
        begun = Path(shutil.copytree(killed, tmp_path / damage))
        published = Path(shutil.copytree(begun / "store", begun / "out", copy_function=os.link))
        before = {path.name: path.read_bytes() for path in published.iterdir()}
        first = begun / "store/tokens-00000.bin"
        if damage == "settings":
            Journal(begun / "journal.jsonl", of={"kind": "another"}, start_over=True)
        elif damage == "lost":
            first.unlink()
        else:
            short = first.read_bytes()[:-2]
            first.unlink()
            first.write_bytes(short)
        counting = Counting()
        tokenprocess.build(begun, "plain", tokenizer=counting)
        assert files(begun) == files(whole)
        assert counting.chars == sum(map(len, tokenprocess.documents(0, 100)))
        assert {path.name: path.read_bytes() for path in published.iterdir()} == before
