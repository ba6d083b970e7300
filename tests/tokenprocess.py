"""Token stores made by processes that die; a module of its own: a child imports it by name."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from paretron.artifacts.journal import Journal
from paretron.data import tokens
from paretron.data.mixing import Mixture, Share
from pico import pico_tokenizer

TEXT = "the cat sat on the mat and the dog ran after it because the day was long"
EOS = 1


def documents(first: int, count: int, *, deadly: int | None = None) -> Iterator[str]:
    """Documents that differ, a long one now and then; SIGKILL instead of number `deadly`."""
    for k in range(count):
        if k == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        yield f"{first + k}: " + TEXT[k % 7 :] * (30 if k % 10 == 3 else 1) + "\n"


def mixture(*, deadly: int | None = None) -> Mixture:
    """Two texts, of which the small one is read several times."""
    large = partial(documents, 0, 400, deadly=deadly)
    return Mixture(
        (Share("large", 3, large, False), Share("small", 1, partial(documents, 1000, 9), True)),
        12_000,
    )


def build(folder: Path, kind: str, *, deadly: int | None = None, tokenizer: Any = None) -> None:
    """Make a store of several shards, or go on with it; the journal is told often."""
    tokens._BATCH_CHARS, tokens._PIECE_CHARS, tokens._SAVE_TOKENS = 600, 500, 2000
    text = mixture(deadly=deadly) if kind == "mixed" else documents(0, 100, deadly=deadly)
    tokens.build_token_store(
        text,
        tokenizer or pico_tokenizer(),
        folder / "store",
        eos_token_id=EOS,
        max_tokens=12_000 if kind == "mixed" else None,
        shard_tokens=2500,
        journal=Journal(folder / "journal.jsonl", of={"kind": kind}, start_over=True),
    )


def killed_at(folder: Path, kind: str, number: int) -> int:
    """The exit code of a process that makes a store until it asks for so-manyth document."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tokenprocess"])
    process = context.Process(target=build, args=(folder, kind), kwargs={"deadly": number})
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode
