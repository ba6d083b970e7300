"""Does what was written load, strictly, and compute? Asked of transformers itself."""

from __future__ import annotations

from pathlib import Path

import torch

from paretron.artifacts.config import family_and_config
from paretron.artifacts.models import load_model
from paretron.errors import Code, ParetronError, Problem
from paretron.families import sizes

_PROMPT_TOKENS = 16


def check_reload(folder: Path) -> torch.Tensor:
    """Load a checkpoint and return its fp32 logits [1, T, vocab] on a fixed prompt.

    Errors: GATE_RELOAD when transformers misses or does not expect a tensor, GATE_NONFINITE when
    a logit is NaN or infinite, and those of the guarded reader.
    """
    model = load_model(folder)
    vocab = sizes(*family_and_config(folder))["vocab"]
    prompt = torch.arange(1, _PROMPT_TOKENS + 1).mul(7).remainder(vocab).unsqueeze(0)
    with torch.no_grad():
        logits: torch.Tensor = model(prompt, use_cache=False).logits.float()
    if not torch.isfinite(logits).all():
        raise ParetronError(
            Problem(
                Code.GATE_NONFINITE,
                "the logits of a fixed prompt are NaN or infinite",
                where=str(folder),
                fix="check the source checkpoint, or write a wider dtype",
            )
        )
    return logits
