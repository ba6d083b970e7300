"""A Hugging Face checkpoint run by PyTorch in this process: loaded, described, waited for."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from paretron.errors import Code, ParetronError, Problem
from paretron_profiling.engines.engine import EngineSettings, compute_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def loaded(model_dir: Path, *, settings: EngineSettings) -> tuple[PreTrainedModel, str]:
    """The checkpoint where it will run, a GPU if there is one, and the name of its dtype.

    MEMORY when the GPU has too little.
    """
    import torch

    from paretron.artifacts.models import load_model

    name = compute_dtype(model_dir, settings=settings)
    model = load_model(model_dir, dtype=getattr(torch, name))
    if torch.cuda.is_available():
        with memory_told(model_dir):
            model.cuda()
    return model, name


@contextmanager
def memory_told(model_dir: Path) -> Iterator[None]:
    """A GPU's lack of memory as MEMORY."""
    import torch

    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise ParetronError(
            Problem(
                Code.MEMORY,
                " ".join(str(error).split())[:300],
                where=str(model_dir),
                fix="smaller batches or lengths, or a dtype of fewer bytes",
            )
        ) from error


def described(model: PreTrainedModel, *, dtype: str, mode: str) -> dict[str, str]:
    """What a model of this process runs with: versions, device, dtype, threads."""
    import torch

    on_gpu = model.device.type == "cuda"
    return {
        "transformers": version("transformers"),
        "torch": version("torch"),
        "mode": mode,
        "dtype": dtype,
        "device": str(model.device),
        **({"gpu": torch.cuda.get_device_name(model.device)} if on_gpu else {}),
        "threads": str(torch.get_num_threads()),
    }


def waiting(model: PreTrainedModel) -> Callable[[], None]:
    """What returns when the device has done everything that it was given.

    A GPU is still at work when a call returns: a clock read then would tell how fast Python asks.
    """
    import torch

    return torch.cuda.synchronize if model.device.type == "cuda" else _at_once


def _at_once() -> None:
    """A processor is done when a call returns."""


def freed() -> None:
    """Give back what nothing refers to any more, on the GPU too, before the next engine loads."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
