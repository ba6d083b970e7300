"""Transformers in this process: eager PyTorch with its dynamic KV cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from paretron.errors import Problem
from paretron.versions import SAFE_FLOORS, missing_or_old
from paretron_profiling.engines.engine import (
    EngineSettings,
    Limits,
    compute_dtype,
    own_process_only,
)
from paretron_profiling.schema import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INSTALL = "pip install --upgrade paretron"


class TransformersEager:
    """Runs a Hugging Face checkpoint in its own dtype, or in the one the recipe states."""

    name = "transformers"
    wants = "hf"
    session_bytes = 100 << 20
    largest_batch: int | None = None

    def check(self, settings: EngineSettings) -> list[Problem]:
        """Whether transformers is recent enough; it is one of Paretron's own requirements."""
        problems = missing_or_old({"transformers": SAFE_FLOORS["transformers"]}, install=INSTALL)
        return problems + own_process_only(settings)

    @contextmanager
    def open(
        self, model_dir: Path, *, settings: EngineSettings, limits: Limits
    ) -> Iterator[EagerSession]:
        """Load the checkpoint through the guarded reader."""
        import torch

        from paretron.artifacts.models import load_model

        name = compute_dtype(model_dir, settings=settings)
        yield EagerSession(load_model(model_dir, dtype=getattr(torch, name)), name)


class EagerSession:
    """A loaded transformers model."""

    def __init__(self, model: PreTrainedModel, dtype: str) -> None:
        self._model, self._dtype = model, dtype

    @property
    def about(self) -> Mapping[str, str]:
        """Versions, dtype and threads."""
        import torch

        return {
            "transformers": version("transformers"),
            "torch": version("torch"),
            "mode": "eager",
            "dtype": self._dtype,
            "device": str(self._model.device),
            "threads": str(torch.get_num_threads()),
        }

    def generate(self, prompts: Sequence[Sequence[int]], output_len: int) -> Sample:
        """Greedy decoding with the model's own forward; one forward a token after the prefill."""
        import torch

        ids_BT = torch.tensor(prompts, device=self._model.device)
        chosen: list[torch.Tensor] = []
        times_s: list[float] = []
        cache: Any = None
        with torch.inference_mode():
            start = perf_counter()
            for _ in range(output_len):
                out = self._model(ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = out.past_key_values
                ids_BT = out.logits[:, -1].argmax(-1, keepdim=True)
                chosen.append(ids_BT)
                times_s.append(perf_counter() - start)
        return Sample.in_lockstep(times_s, tokens=torch.cat(chosen, 1).tolist())


ENGINE = TransformersEager()
