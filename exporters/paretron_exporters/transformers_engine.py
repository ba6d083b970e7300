"""Transformers as the engine that every export is held against."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from paretron.artifacts.models import load_model
from paretron.evaluate.parity import Logits, Observation, Prompt, observe

# Below this many parameters one token is so little work that threads only wait for each other:
# on a busy machine that took twenty times as long.
SMALL = 100_000_000


class TransformersEngine:
    """A checkpoint folder, or a model that is there already, in float32 on the CPU."""

    name = "transformers float32"

    def __init__(self, source: Path | PreTrainedModel) -> None:
        model = load_model(source) if isinstance(source, Path) else source
        self.model: PreTrainedModel = model
        for parameter in self.model.parameters():
            # Out of the file's mapping: kernels round differently by alignment, and two files
            # with the same weights must give the same bits.
            parameter.data = parameter.data.clone()

    def start(self) -> _Session:
        """An empty sequence."""
        return _Session(self.model)


class _Session:
    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._cache = DynamicCache(config=model.config)
        self._small = sum(p.numel() for p in model.parameters()) < SMALL

    @torch.inference_mode()
    def feed(self, ids: Sequence[int]) -> Logits:
        """Append tokens; logits (len(ids), vocab)."""
        with _threads(1 if self._small else torch.get_num_threads()):
            out: Any = self._model(
                torch.tensor([list(ids)]), past_key_values=self._cache, use_cache=True
            )
        logits: Logits = out.logits[0].float().numpy()
        return logits


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def observe_transformers(source: Path | PreTrainedModel, prompts: Sequence[Prompt]) -> Observation:
    """Load a checkpoint, or take a model, observe it, and free its memory again."""
    engine = TransformersEngine(source)
    try:
        return observe(engine, prompts)
    finally:
        del engine
        gc.collect()
