"""Transformers in this process: a static KV cache and a compiled decode step.

On a GPU the step is a CUDA graph (`reduce-overhead`), so that launching its kernels costs next to
nothing; the prefill is eager PyTorch. Each batch and length has a cache and a program of its own.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from types import FunctionType
from typing import TYPE_CHECKING, TypeAlias, cast

from paretron.errors import Code, ParetronError, Problem
from paretron_profiling.engines.engine import EngineSettings, Limits, Session
from paretron_profiling.engines.torch_models import (
    described,
    freed,
    loaded,
    memory_told,
    waiting,
)
from paretron_profiling.engines.transformers_eager import TransformersEager
from paretron_profiling.schema import Sample

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Following: TypeAlias = "Callable[[Tensor], Tensor]"  # tokens [batch][T] -> the next ones [batch][1]

# A CUDA graph runs as it is at first, is recorded at the second call and replayed at the third.
PREPARING_STEPS = 3


class TransformersCompiled(TransformersEager):
    """Runs a Hugging Face checkpoint as fast as transformers can."""

    name = "transformers_compiled"

    def check(self, settings: EngineSettings) -> list[Problem]:
        """Also whether there is a compiler for what PyTorch writes."""
        problems = super().check(settings)
        if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
            problems.append(
                Problem(
                    Code.OPTIONAL_MISSING,
                    "torch.compile needs a C++ compiler, and there is none",
                    where=f"profile.engines: {self.name}",
                    fix="install g++, name another in CXX, or profile `transformers`",
                )
            )
        return problems

    @contextmanager
    def open(
        self, model_dir: Path, *, settings: EngineSettings, limits: Limits
    ) -> Iterator[Session]:
        """Load the checkpoint through the guarded reader; programs are made when first used."""
        session = CompiledSession(*loaded(model_dir, settings=settings), model_dir)
        try:
            yield session
        finally:
            session.close()


class CompiledSession:
    """A loaded transformers model and its programs, by batch and lengths."""

    def __init__(self, model: PreTrainedModel, dtype: str, model_dir: Path) -> None:
        self._model, self._dtype, self._dir = model, dtype, model_dir
        self._programs: dict[tuple[int, int], _Program] = {}

    @property
    def about(self) -> Mapping[str, str]:
        """Versions, dtype, device and threads."""
        graphs = ", CUDA graphs" if self._model.device.type == "cuda" else ""
        mode = f"static cache, compiled decode step{graphs}, prefill not compiled"
        return described(self._model, dtype=self._dtype, mode=mode)

    @property
    def pid(self) -> int:
        """This process."""
        return os.getpid()

    def generate(self, prompts: Sequence[Sequence[int]], output_len: int) -> Sample:
        """Greedy decoding; what is not compiled yet is, before the clock starts."""
        import torch

        ids_BT = torch.tensor(prompts, device=self._model.device)
        chosen: list[Tensor] = []
        times_s: list[float] = []
        wait = waiting(self._model)
        with torch.no_grad(), memory_told(self._dir):
            program = self._prepared(ids_BT, output_len)
            program.reset()
            wait()
            start = perf_counter()
            ids_B1 = program.prefill(ids_BT)
            wait()
            times_s.append(perf_counter() - start)
            chosen.append(ids_B1)
            for _ in range(output_len - 1):
                ids_B1 = program.step(ids_B1)
                wait()
                times_s.append(perf_counter() - start)
                chosen.append(ids_B1)
        return Sample.in_lockstep(times_s, tokens=torch.cat(chosen, 1).tolist())

    def close(self) -> None:
        """Free the model, the caches and the graphs that hold their addresses."""
        import torch

        self._programs.clear()
        del self._model
        torch.compiler.reset()
        freed()

    def _prepared(self, ids_BT: Tensor, output_len: int) -> _Program:
        """The program of a batch and length, which has run often enough to be at its fastest."""
        from torch._dynamo.exc import TorchDynamoException
        from torch._inductor.exc import InductorError

        batch, input_len = ids_BT.shape
        length = input_len + output_len
        if (batch, length) in self._programs:
            return self._programs[batch, length]
        program = _Program(self._model, length=length)
        try:
            for turn in range(PREPARING_STEPS if output_len > 1 else 0):
                if turn % (output_len - 1) == 0:  # else the cache would run over
                    program.reset()
                    ids_B1 = program.prefill(ids_BT)
                ids_B1 = program.step(ids_B1)
        except (TorchDynamoException, InductorError) as error:
            raise _not_compiled(self._dir, error) from error
        self._programs[batch, length] = program
        return program


class _Program:
    """A static cache, and the compiled step that reads and fills it."""

    def __init__(self, model: PreTrainedModel, *, length: int) -> None:
        import torch
        from transformers.cache_utils import Cache, StaticLayer

        # Layers that attend in a window get the whole length too, and a mask: a cache that is as
        # long as the window counts its tokens in Python, which would be a new graph a token.
        layers = [StaticLayer(max_cache_len=length) for _ in range(model.config.num_hidden_layers)]
        self._cache = cache = Cache(layers=layers)

        def following(ids_BT: Tensor) -> Tensor:
            out = model(ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
            best_B1: Tensor = out.logits[:, -1].argmax(-1, keepdim=True)
            return best_B1

        self.prefill = following
        self._step: Following = torch.compile(
            _apart(following),
            fullgraph=True,
            dynamic=False,
            mode="reduce-overhead" if model.device.type == "cuda" else "default",
        )

    def reset(self) -> None:
        """Forget every token."""
        self._cache.reset()

    def step(self, ids_B1: Tensor) -> Tensor:
        """The tokens after these."""
        import torch

        torch.compiler.cudagraph_mark_step_begin()
        return self._step(ids_B1).clone()  # a graph writes its next answer to the same place


def _apart(function: Following) -> Following:
    """The function with a code object of its own.

    The compiler counts programs by code object and stops compiling at the eighth; here every batch
    of every model is one.
    """
    made = cast(FunctionType, function)
    code, closure = made.__code__.replace(), made.__closure__
    return FunctionType(code, made.__globals__, made.__name__, None, closure)


def _not_compiled(model_dir: Path, error: Exception) -> ParetronError:
    return ParetronError(
        Problem(
            Code.ENGINE,
            f"it cannot be compiled: {' '.join(str(error).split())[:300]}",
            where=str(model_dir),
            fix="profile it with `transformers`, which compiles nothing",
        )
    )


ENGINE = TransformersCompiled()
