"""Llama-3.1-8B against the 4B width and depth shapes on one GPU, engine by engine: JSON.

PYTHONPATH=tests python -m benchmarks.gpu.profiling --folder /data/profiling --out $OUT

Random weights in bf16, written to the folder once (34 GB). Prefill and decode at the same batch and
in the same memory, beside what the papers measured (1.8 and 2.7, TensorRT-LLM, FP8, H100) and what
the device's bandwidth, matrix rate and launches allow. Engines: transformers eager, transformers
with a static cache and CUDA graphs, and with --vllm PYTHON also vLLM in bf16 and FP8. Compiling
takes minutes: name one engine a command where time is short. --small runs on a CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.shapes import (
    DEPTH_4B,
    LLAMA_8B,
    PICO,
    PICO_STUDENT,
    WIDTH_4B,
    machine,
    random_llama,
)
from paretron.artifacts.jsonfile import dump
from paretron.artifacts.reader import Checkpoint
from paretron.plan.cost import model_facts
from paretron.recipe import Profile
from paretron_profiling.measure import profile_models, with_bounds
from paretron_profiling.models import TEACHER, ModelFacts, ModelUnderTest
from paretron_profiling.result import ProfileResult, ProfileStopped

SHAPES = {TEACHER: LLAMA_8B, "width": WIDTH_4B, "depth": DEPTH_4B}
SMALL = {TEACHER: PICO, "width": PICO_STUDENT, "depth": PICO | {"num_hidden_layers": 1}}
OURS = ("transformers", "transformers_compiled")
VLLM = ("vllm", "vllm_fp8")
PUBLISHED = {
    "width": 1.8, "depth": 2.7,
    "of": "output tokens/s over the teacher's, TensorRT-LLM, FP8, one H100; larger batches of the "
    "students in the teacher's memory, as far as the paper says",
}  # fmt: skip


def models_in(
    folder: Path, shapes: Mapping[str, dict[str, Any]], *, device: str
) -> list[ModelUnderTest]:
    """Checkpoints of random weights, made where the folder lacks them."""
    found = []
    for name, shape in shapes.items():
        place = folder / name
        if not (place / "config.json").exists():
            random_llama(shape, dtype=torch.bfloat16, device=device).save_pretrained(place)
            if device == "cuda":
                torch.cuda.empty_cache()
        found.append(ModelUnderTest(name, name, {"hf": place}, ModelFacts.of(place)))
    return found


def as_fp8(model: ModelUnderTest) -> ModelUnderTest:
    """The model by what it takes when its blocks' weights have a byte: which batch fits follows."""
    facts = counted(model)
    spared = facts["non_embedding_params"]  # bf16 has two bytes of each
    small = replace(model.facts, weight_bytes=model.facts.weight_bytes - spared)
    return replace(model, facts=small)


def counted(model: ModelUnderTest) -> dict[str, int]:
    """Parameters and bytes of a checkpoint."""
    checkpoint = Checkpoint.open(model.folders["hf"])
    facts = model_facts(checkpoint.config, dtype=checkpoint.dtype)
    return {
        "params": facts.params,
        "non_embedding_params": facts.non_embedding_params,
        "weight_bytes": facts.weight_bytes,
        "kv_bytes_per_token": facts.kv_bytes_per_token,
    }


def measured(models: Sequence[ModelUnderTest], profile: Profile) -> ProfileResult:
    """The profile with its roofline; what was measured until an engine failed, marked so."""
    try:
        result = profile_models(models, profile=profile, on_event=said)
    except ProfileStopped as stopped:
        result = stopped.partial
    return with_bounds(result, models, on_event=said)


def said(kind: str, fields: Mapping[str, object]) -> None:
    """What happens, beside the JSON."""
    print(kind, dict(fields), file=sys.stderr)


def told(result: ProfileResult) -> dict[str, Any]:
    """Everything of a profile but its raw samples."""
    content = result.to_json()
    rows = {name: [m.summary() for m in found] for name, found in result.measurements.items()}
    return content | {"models": rows}


def main() -> None:
    """Print one JSON object; raw samples go to --out."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True, help="where the models lie")
    parser.add_argument("--out", type=Path, help="where profiles with raw samples go")
    parser.add_argument("--engines", nargs="+", choices=OURS + VLLM)
    parser.add_argument("--vllm", type=Path, help="the interpreter that has vLLM")
    parser.add_argument("--batches", nargs="+", type=int, default=[32])
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--small", action="store_true")
    a = parser.parse_args()
    batches, lengths = ([2], (8, 4)) if a.small else (a.batches, (a.input_len, a.output_len))
    engines = a.engines or (OURS + VLLM if a.vllm else OURS)
    models = models_in(a.folder, SMALL if a.small else SHAPES, device="cpu" if a.small else "cuda")
    profiles = {}
    for engine in engines:  # one after the other: none may hold memory that another needs
        python = {"python": a.vllm.absolute()} if engine in VLLM else {}
        profile = Profile.model_validate(
            {
                "engines": [{"name": engine, **python}],
                "batches": batches,
                "lengths": [lengths],
                "repeats": 2 if a.small else a.repeats,
            }
        )
        under_test = [as_fp8(m) for m in models] if engine == "vllm_fp8" else models
        result = measured(under_test, profile)
        profiles[engine] = told(result)
        if a.out:
            a.out.mkdir(parents=True, exist_ok=True)
            dump(a.out / f"{engine}.json", result.to_json())
    report = machine() | {
        "models": {m.name: counted(m) for m in models},
        "published": PUBLISHED,
        "profiles": profiles,
    }
    if a.out:
        dump(a.out / "profiling.json", report)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
