"""Running out of memory as an error with advice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from paretron.errors import Code, ParetronError, Problem
from paretron.recipe import Distill, Training

_CPU_SIGN = "can't allocate memory"  # what torch's CPU allocator says in a RuntimeError


@contextmanager
def memory_explained(
    settings: Training,
    *,
    state_bytes: int,
    peak_bytes: Callable[[], int],
    asks_alone: bool = False,
) -> Iterator[None]:
    """Turn a failed allocation inside into MEMORY (exit 4).

    `state_bytes` is what weights, gradients and moments take in this process, before any
    activation; `peak_bytes` says what it had at most when it failed. With `asks_alone` nothing is
    trained: there are weights only.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        kinds = (torch.OutOfMemoryError, MemoryError)
        if not isinstance(error, kinds) and _CPU_SIGN not in str(error):
            raise
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise ParetronError(
            Problem(
                Code.MEMORY,
                f"{said}; {'weights' if asks_alone else 'weights, gradients and moments'} take "
                f"{state_bytes / 1e9:.2f} GB here, the peak was {peak_bytes() / 1e9:.2f} GB",
                where=f"micro_batch {settings.micro_batch}, processes {settings.processes}",
                fix=_advice_for_asking(settings) if asks_alone else _advice(settings),
            )
        ) from error


def _advice(settings: Training) -> str:
    """What would take less memory and is not in use yet."""
    advice = []
    if settings.micro_batch > 1:
        advice.append("a smaller micro_batch")
    if not settings.activation_checkpointing:
        advice.append("activation_checkpointing: true")
    advice.append("more processes on other devices")
    if not (isinstance(settings, Distill) and (settings.phases or settings.offline)):
        advice.append("a shorter seq_len")  # of phases or a capture it is another training
    return f"{', or '.join(advice)}; the training goes on where it was"


def _advice_for_asking(settings: Training) -> str:
    """The same of a teacher that is asked: every process has all of it."""
    advice = ["a smaller micro_batch"] if settings.micro_batch > 1 else []
    if settings.dtype == "float32":
        advice.append("dtype: bfloat16")
    advice += ["a shorter seq_len", "a device with more memory"]
    return f"{', or '.join(advice)}; with another micro_batch the same command goes on"
