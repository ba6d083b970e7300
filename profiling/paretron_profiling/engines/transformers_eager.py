"""Transformers in this process: eager PyTorch with its dynamic KV cache."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from paretron.errors import Problem
from paretron.versions import SAFE_FLOORS, missing_or_old
from paretron_profiling.engines.engine import EngineSettings, Limits, Session, own_process_only
from paretron_profiling.engines.torch_models import (
    described,
    freed,
    loaded,
    memory_told,
    waiting,
)
from paretron_profiling.schema import OFFLINE, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INSTALL = "pip install --upgrade paretron"


class TransformersEager:
    """Runs a Hugging Face checkpoint in its own dtype, or in the one the recipe states."""

    name = "transformers"
    wants = "hf"
    modes = frozenset({OFFLINE})
    session_bytes = 100 << 20
    largest_batch: int | None = None

    def check(self, settings: EngineSettings) -> list[Problem]:
        """Whether transformers is recent enough; it is one of Paretron's own requirements."""
        problems = missing_or_old({"transformers": SAFE_FLOORS["transformers"]}, install=INSTALL)
        return problems + own_process_only(settings)

    @contextmanager
    def open(
        self, model_dir: Path, *, settings: EngineSettings, limits: Limits
    ) -> Iterator[Session]:
        """Load the checkpoint through the guarded reader."""
        session = EagerSession(*loaded(model_dir, settings=settings), model_dir)
        try:
            yield session
        finally:
            session.close()


class EagerSession:
    """A loaded transformers model."""

    def __init__(self, model: PreTrainedModel, dtype: str, model_dir: Path) -> None:
        self._model, self._dtype, self._dir = model, dtype, model_dir

    @property
    def about(self) -> Mapping[str, str]:
        """Versions, dtype, device and threads."""
        return described(self._model, dtype=self._dtype, mode="eager")

    @property
    def pid(self) -> int:
        """This process."""
        return os.getpid()

    def generate(self, prompts: Sequence[Sequence[int]], output_len: int) -> Sample:
        """Greedy decoding with the model's own forward; one forward a token after the prefill."""
        import torch

        ids_BT = torch.tensor(prompts, device=self._model.device)
        chosen: list[torch.Tensor] = []
        times_s: list[float] = []
        cache: Any = None
        wait = waiting(self._model)
        with torch.inference_mode(), memory_told(self._dir):
            wait()
            start = perf_counter()
            for _ in range(output_len):
                out = self._model(ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = out.past_key_values
                ids_BT = out.logits[:, -1].argmax(-1, keepdim=True)
                chosen.append(ids_BT)
                wait()
                times_s.append(perf_counter() - start)
        return Sample.in_lockstep(times_s, tokens=torch.cat(chosen, 1).tolist())

    def close(self) -> None:
        """Free the model now, whoever still holds the session."""
        del self._model
        freed()


ENGINE = TransformersEager()
