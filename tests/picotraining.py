"""A little text as tokens, and trainings of seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from makers import PicoMaker

TEXTS = [
    "the cat sat on the mat and the dog ran after it, because the day was long; " * 40,
    "def main(self): return self.value + 1  # and then some more of the same\n" * 40,
    "while the sun was warm: sat.on(the.mat); ran(after, it) == (the, cat, and, dog)\n" * 40,
]
SEQ_LEN = 32

Arguments = Callable[..., dict[str, Any]]


@pytest.fixture
def tokens(pico: PicoMaker, tmp_path: Path) -> Path:
    """A token store of a few hundred windows of SEQ_LEN tokens."""
    from paretron.artifacts.models import load_tokenizer
    from paretron.data.tokens import build_token_store

    tokenizer = load_tokenizer(pico("llama", name="tokenizer", num_hidden_layers=2))
    build_token_store(TEXTS, tokenizer, tmp_path / "tokens", eos_token_id=1)
    return tmp_path / "tokens"


@pytest.fixture
def arguments(pico: PicoMaker, tmp_path: Path, tokens: Path) -> Arguments:
    """The arguments of `train` for a run of `steps` steps, as a rehearsal: models are random."""

    def make(*, family: str = "llama", **wanted: Any) -> dict[str, Any]:
        for name, seed, hidden in (("student", 1, 48), ("teacher", 2, 64)):
            if not (tmp_path / name).exists():
                pico(family, name=name, seed=seed, hidden_size=hidden, num_hidden_layers=2)
        return training_arguments(tmp_path, **wanted)

    return make


def training_arguments(
    folder: Path,
    *,
    steps: int = 4,
    distil: bool = True,
    on_event: Callable[[str, Mapping[str, object]], None] | None = None,
    validate: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """The arguments of `train` where student, teacher and tokens lie in `folder`."""
    from paretron.artifacts.manifest import Provenance
    from paretron.recipe import Distill

    batch = {"global_batch": 8, "micro_batch": 4} | settings
    training = {
        "tokens": steps * batch["global_batch"] * SEQ_LEN,
        "lr": 3e-3,
        "min_lr": 3e-4,
        "warmup_steps": 1,
        "dtype": "float32",
    }
    return {
        "student": folder / "student",
        "train_tokens": folder / "tokens",
        "teacher": folder / "teacher" if distil else None,
        "settings": Distill(**training | batch),
        "seq_len": SEQ_LEN,
        "validation_tokens": folder / "tokens" if validate else None,
        "validation_seq_len": 256,
        "seed": 7,
        "out": folder / "out",
        "state": folder / "state",
        "provenance": Provenance(kind="distill", stamp="TEST"),
        "on_event": on_event or (lambda kind, fields: None),
    }
