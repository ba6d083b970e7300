"""A model without its weights, filled and emptied part by part: for checkpoints beyond memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from paretron.artifacts.models import library_config
from paretron.artifacts.reader import Checkpoint
from paretron.errors import Code, ParetronError, Problem


def empty_model(checkpoint: Checkpoint, *, dtype: torch.dtype) -> PreTrainedModel:
    """The checkpoint's transformers model in eval mode, its matrices on the meta device.

    What the config alone determines (rotary frequencies, embedding scales) is real.
    """
    with _EmptyOnMeta():
        model = AutoModelForCausalLM.from_config(
            library_config(checkpoint), dtype=dtype, trust_remote_code=False
        )
    return model.eval()


def fill(
    module: nn.Module, state: dict[str, torch.Tensor], *, where: str
) -> dict[str, torch.Tensor]:
    """Put weights into a module without a copy; returns what stood there, to put back later.

    GATE_RELOAD when a name or a shape is not the module's.
    """
    before = dict(module.state_dict())
    try:
        module.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise ParetronError(
            Problem(
                Code.GATE_RELOAD,
                " ".join(str(error).split())[:300],
                where=where,
                fix="try another transformers version: this one names the tensors otherwise",
            )
        ) from error
    return before


class _EmptyOnMeta(TorchFunctionMode):
    """Matrices are made by torch.empty and filled later; everything else is computed as usual."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.empty:
            return func(*args, **{**(kwargs or {}), "device": "meta"})
        return func(*args, **(kwargs or {}))
