"""What a training asks of its devices and libraries, said alike when planning and when running."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec

from paretron.errors import Code, Problem
from paretron.recipe.training import Distill, Training

_COMPILERS = ("g++", "clang++", "c++")


def device_problems(training: Training, *, capped: bool, apart: bool, where: str) -> list[Problem]:
    """Why a model cannot be trained as `training` says; `where` names the section.

    `capped` says whether its attention scores are, `apart` whether documents of a window are texts
    of their own.
    """
    problems = []
    if training.attention == "flash_attention_2":
        problems += _flash_problems(training, capped=capped, apart=apart, key=f"{where}.attention")
    if training.compile and not _has_compiler():
        problems.append(
            Problem(
                Code.OPTIONAL_MISSING,
                "compile needs a C++ compiler, and none is found",
                where=f"{where}.compile",
                fix="install g++, or name a compiler in CXX",
            )
        )
    return problems


def _flash_problems(training: Training, *, capped: bool, apart: bool, key: str) -> list[Problem]:
    problems = []
    if find_spec("flash_attn") is None:
        problems.append(
            Problem(
                Code.OPTIONAL_MISSING,
                "flash_attention_2 needs flash-attn, which is not installed",
                where=key,
                fix="pip install flash-attn --no-build-isolation, on a machine with CUDA",
            )
        )
    if capped:
        cause = "flash_attention_2 was not tried with a model that caps its attention scores"
        problems.append(Problem(Code.UNSUPPORTED, cause, where=key, fix="attention: sdpa"))
    phases = training.phases if isinstance(training, Distill) else ()
    batches = {phase.micro_batch or training.micro_batch for phase in phases}
    # transformers looks for positions that begin again in batches of one window alone.
    if apart and max(batches or {training.micro_batch}) > 1:
        problems.append(
            Problem(
                Code.UNSUPPORTED,
                "flash_attention_2 keeps documents apart in one window at a time",
                where=key,
                fix="micro_batch: 1, data.train.documents: joined, or attention: sdpa",
            )
        )
    return problems


def _has_compiler() -> bool:
    named = os.environ.get("CXX")
    return any(map(shutil.which, (named,) if named else _COMPILERS))
