"""Running out of memory as an error with advice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from paretron.errors import Code, ParetronError, Problem
from paretron.recipe import Training

_CPU_SIGN = "can't allocate memory"  # what torch's CPU allocator says in a RuntimeError


@contextmanager
def memory_explained(settings: Training) -> Iterator[None]:
    """Turn a failed allocation inside into MEMORY (exit 4)."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        kinds = (torch.OutOfMemoryError, MemoryError)
        if not isinstance(error, kinds) and _CPU_SIGN not in str(error):
            raise
        raise ParetronError(
            Problem(
                Code.MEMORY,
                " ".join(str(error).split())[:300] or type(error).__name__,
                where=f"micro_batch {settings.micro_batch}, processes {settings.processes}",
                fix="a smaller micro_batch, which the same training may go on with, or a shorter "
                "seq_len, or more processes on other devices",
            )
        ) from error
