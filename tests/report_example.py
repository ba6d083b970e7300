"""The content of a report on a made-up run: a teacher, a width and a depth student, two engines."""

from __future__ import annotations

import math
import random
from typing import Any

from paretron_profiling.compare import match_memory, speedups
from paretron_profiling.models import ModelFacts, ModelUnderTest
from paretron_profiling.schema import Measurement, Sample, Workload, jsonable

# params, hidden, layers, KV bytes a token, speed, loss when pruned, final loss
MODELS: dict[str, tuple[int, int, int, int, float, float | None, float]] = {
    "teacher": (6_100_000, 192, 8, 4096, 1.0, None, 3.412),
    "width": (3_400_000, 128, 8, 4096, 1.38, 4.91, 3.523),
    "depth": (3_450_000, 192, 4, 2048, 1.85, 4.22, 3.611),
}
LENGTHS = (128, 128)
BATCHES = (1, 4)


def example_report(**changes: Any) -> dict[str, Any]:
    """A report's content; keywords replace whole keys of it."""
    rng = random.Random(3)
    models = [
        ModelUnderTest(name, name, {}, ModelFacts(4096, 4 * params, kv, 512))
        for name, (params, _, _, kv, *_) in MODELS.items()
    ]
    measured = {
        m.name: [
            _measurement(m, models[0], engine, base, batch, rng)
            for engine, base in (("ortgenai", 2600.0), ("vllm", 900.0))
            for batch in _batches(m, models[0])
        ]
        for m in models
    }
    content = {
        "schema": 1,
        "title": "quickstart",
        "created": "2026-01-02T03:04:05+00:00",
        "seed": 0,
        "models": [_model(name, measured[name]) for name in MODELS],
        "speedup": [s.to_json() for s in speedups(measured, models=models)],
        "curves": list(_curves(rng)),
        "hardware": {
            "cpu": "Example CPU", "cores": 2, "threads": 2, "memory_bytes": 25_000_000_000,
            "os": "Linux 6, x86_64", "omp_num_threads": "not set", "load_1m": 0.3,
            "date": "2026-01-02T03:00:00+00:00",
        },
        "versions": {"paretron": "0.1.0", "torch": "2.13.0"},
        "engines": {"ortgenai": {"onnxruntime-genai": "0.18.0"}, "vllm": {"vllm": "0.32.0"}},
        "method": {"repeats": 3, "warmup": 1, "order": "interleaved"},
        "captions": ["Each student was distilled on 2,500,000 tokens."],
    }  # fmt: skip
    return dict(jsonable(content | changes))


def _batches(model: ModelUnderTest, teacher: ModelUnderTest) -> list[int]:
    if model is teacher:
        return [*BATCHES]
    match = match_memory(
        model.facts, teacher=teacher.facts, reference_batch=BATCHES[-1], context_len=sum(LENGTHS)
    )
    return [*BATCHES, match.batch]


def _measurement(
    model: ModelUnderTest,
    teacher: ModelUnderTest,
    engine: str,
    base: float,
    batch: int,
    rng: random.Random,
) -> Measurement:
    work, samples = Workload(engine, batch, *LENGTHS), []
    noise = 0.08 if (engine, model.name) == ("vllm", "depth") else 0.015
    for _ in range(3):
        speed = base * batch**0.7 * MODELS[model.name][4] * (1 + rng.uniform(-noise, noise))
        total = batch * work.output_len / speed
        first = 0.12 * total
        rest = (total - first) / (work.output_len - 1)
        times = [first + k * rest for k in range(work.output_len)]
        samples.append(Sample.in_lockstep(times, tokens=[[0] * work.output_len] * batch))
    return Measurement.of(work, samples=samples, warmup=1)


def _model(name: str, measured: list[Measurement]) -> dict[str, Any]:
    params, hidden, layers, kv, _, pruned, final = MODELS[name]
    checks = [
        {"level": "L2", "about": "logits", "passed": True, "measured": {"max_abs": 8.1e-6},
         "bounds": {"max_abs": 1e-4}, "worst": ""},
        {"level": "L4", "about": "greedy tokens", "passed": True, "measured": {"different": 0},
         "bounds": {}, "worst": ""},
    ]  # fmt: skip
    return {
        "name": name,
        "kind": name,
        "params": params,
        "non_embedding_params": params - 2 * 4096 * hidden,
        "weight_bytes": 4 * params,
        "kv_bytes_per_token": kv,
        "shape": {"layers": layers, "hidden": hidden, "heads": 6, "kv_heads": 2, "ffn": 512},
        "loss": {"pruned": pruned, "final": final},
        "perplexity": {"validation": math.exp(final)},
        "speed": [m.summary() for m in measured],
        "artifacts": [
            {
                "to": to,
                "path": f"runs/quickstart/{name}/{to}",
                "bytes": 4 * params,
                "checks": checks,
            }
            for to in ("hf", "onnx")
        ],
    }


def _curves(rng: random.Random) -> list[dict[str, Any]]:
    out = []
    for name in ("width", "depth"):
        pruned, final = MODELS[name][5] or 0.0, MODELS[name][6]
        steps = range(0, 301, 20)
        values = [final + (pruned - final) * math.exp(-k / 25) for k in steps]
        out.append(_curve(name, "loss", "validation", list(steps), values))
        steps = range(1, 301)
        values = [0.9 * math.exp(-k / 30) + 0.15 + rng.uniform(0, 0.03) for k in steps]
        out.append(_curve(name, "forward_kl", "train", list(steps), values))
    return out


def _curve(
    model: str, metric: str, split: str, steps: list[int], values: list[float]
) -> dict[str, Any]:
    return {
        "model": model, "stage": "distill", "metric": metric, "split": split,
        "tokens": [8192 * k for k in steps], "values": values,
    }  # fmt: skip
