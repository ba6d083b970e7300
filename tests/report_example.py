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
CONCURRENCY = (1, 4, 16)


def example_profile() -> dict[str, Any]:
    """The content of a profile.json that the report's figures may be from."""
    models, measured = _measured(random.Random(3))
    return {
        "schema": "profile.v1",
        "incomplete": None,
        "models": {name: [m.to_json() for m in found] for name, found in measured.items()},
        "speedup": [s.to_json() for s in speedups(measured, models=models)],
        "hardware": {"cpu": "Example CPU", "cores": 2},
        "engines": {"vllm": {"vllm": "0.32.0"}},
        "method": {"repeats": 3, "warmup": 1},
        "memory": _memory(),
    }


def _measured(
    rng: random.Random,
) -> tuple[list[ModelUnderTest], dict[str, list[Measurement]]]:
    models = [
        ModelUnderTest(name, name, {}, ModelFacts(4096, 4 * params, kv, 512))
        for name, (params, _, _, kv, *_) in MODELS.items()
    ]
    return models, {
        m.name: [
            *(
                _measurement(m, models[0], engine, base, batch, rng)
                for engine, base in (("ortgenai", 260.0), ("vllm", 90.0))
                for batch in _batches(m, models[0])
            ),
            *(_loop(m, in_flight, rng) for in_flight in CONCURRENCY),
        ]
        for m in models
    }


def example_report(**changes: Any) -> dict[str, Any]:
    """A report's content; keywords replace whole keys of it."""
    rng = random.Random(3)
    models, measured = _measured(rng)
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
        "goals": _goals(),
        "roofline": _roofline(measured),
        "device": {"name": "Example CPU", "bandwidth_bytes_s": 2.1e10, "flop_s": {"float32": 9e10}},
        "memory": _memory(),
        "importance": _importance(rng),
        "cost": _cost(),
        "raw": [{"path": "../stages/profile/profile.json", "sha256": "ab" * 32}],
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
    work, samples = Workload.at_once(engine, batch, *LENGTHS), []
    noise = 0.08 if (engine, model.name) == ("vllm", "depth") else 0.015
    for _ in range(3):
        speed = base * batch**0.7 * MODELS[model.name][4] * (1 + rng.uniform(-noise, noise))
        total = batch * work.output_len / speed
        first = 0.12 * total
        rest = (total - first) / (work.output_len - 1)
        times = [first + k * rest for k in range(work.output_len)]
        samples.append(Sample.in_lockstep(times, tokens=[[0] * work.output_len] * batch))
    return Measurement.of(work, samples=samples, warmup=1)


def _loop(model: ModelUnderTest, in_flight: int, rng: random.Random) -> Measurement:
    """So many requests in flight, each followed by the next: 4 rounds of them, three times."""
    work = Workload("vllm", "closed", in_flight, *LENGTHS)
    faster, samples = MODELS[model.name][4], []
    for _ in range(3):
        sent, first, finish, gaps = [], [], [], []
        for request in range(4 * in_flight):
            step = (0.006 + 0.0006 * in_flight) / faster * (1 + rng.uniform(-0.01, 0.01))
            begin = request // in_flight * 130 * step
            sent.append(begin)
            first.append(begin + (2 + 0.4 * in_flight * rng.random()) * step)
            finish.append(first[-1] + (LENGTHS[1] - 1) * step)
            gaps.append(step)
        samples.append(Sample(tuple(sent), tuple(first), tuple(finish), tuple(gaps)))
    return Measurement.of(work, samples=samples, warmup=1)


def _goals() -> list[dict[str, Any]]:
    about = "; median of paired ratios, 3 pairs"
    return [
        {"model": model, "figure": "output_tok_s", "bound": 1.5, "value": value,
         "text": f"at least 1.5 times the teacher's{about}", "low": 0.98 * value,
         "high": 1.02 * value, "verdict": verdict}
        for model, value, verdict in (("width", 1.38, "missed"), ("depth", 1.85, "met"))
    ] + [
        {"model": model, "figure": "task.mmlu", "bound": -3.0, "value": None, "low": None,
         "text": "at least the teacher's less 3; not measured", "high": None, "verdict": "absent"}
        for model in ("width", "depth")
    ]  # fmt: skip


def _roofline(measured: dict[str, list[Measurement]]) -> dict[str, Any]:
    rows = []
    for name, found in measured.items():
        for m in found:
            if m.mode != "offline" or m.prefill_tok_s is None or m.decode_tok_s is None:
                continue
            work = {k: getattr(m, k) for k in ("engine", "mode", "load", "input_len", "output_len")}
            for phase, seconds, limit in (
                ("prefill", m.load * m.input_len / m.prefill_tok_s, "arithmetic"),
                ("decode", m.load / m.decode_tok_s, "weights"),
            ):
                rows.append({
                    "model": name, **work, "phase": phase, "bound_s": 0.6 * seconds,
                    "limited_by": limit, "measured_s": seconds, "attained": 0.6,
                    "parts": {"weights_s": 0.6 * seconds, "compute_s": 0.3 * seconds},
                })  # fmt: skip
    return {"rows": rows, "speedup": [], "notes": ["closed loops were left out of this example"]}


def _memory() -> list[dict[str, Any]]:
    """Peaks of one engine in this process, and of one with its own and a GPU."""
    lengths = dict(zip(("input_len", "output_len"), LENGTHS, strict=True))
    works = (("ortgenai", "offline", 4, None, False), ("vllm", "closed", 16, 2_000_000_000, True))
    return [
        {"model": name, "engine": engine, "mode": mode, "load": load, **lengths,
         "host_bytes": 40 * params, "device_bytes": device, "own_process": own}
        for name, (params, *_) in MODELS.items()
        for engine, mode, load, device, own in works
    ]  # fmt: skip


def _importance(rng: random.Random) -> dict[str, Any]:
    heat = [
        [math.exp(-k / (4 + layer)) * (0.6 + 0.4 * rng.random()) for k in range(24)]
        for layer in range(8)
    ]
    return {
        "criterion": "activation", "samples": 64, "tokens": 8192,
        "layers": [{"metric": "loss without it", "values": [0.9, 0.4, 0.2, 0.1, 0.1, 0.3, 0.6]}],
        "axes": [
            {"axis": "ffn", "units": 512, "values": heat,
             "places": [f"model.layers.{i}.mlp.down_proj" for i in range(8)]},
        ],
    }  # fmt: skip


def _cost() -> dict[str, Any]:
    stages = (
        ("score", "score", 21.0, None),
        ("width.distill", "distill", 812.0, 2_500_000),
        ("depth.distill", "distill", 640.0, 2_500_000),
        ("profile", "profile", 95.0, None),
    )
    flops = {"teacher": 3.4e7, "width": 1.9e7, "depth": 1.9e7}
    members = [
        {"model": name, "flops_per_token": each, "scratch_tokens": 1e8,
         "tokens": 1e8 if name == "teacher" else 2.5e6}
        for name, each in flops.items()
    ]  # fmt: skip
    return {
        "device": "CPU",
        "stages": [
            {"stage": stage, "kind": kind, "seconds": seconds, "tokens": tokens}
            for stage, kind, seconds, tokens in stages
        ],
        "family": {
            "basis": "the teacher was trained on 100,000,000 tokens", "members": members,
            "scratch_flops": 7.2e15, "flops": 3.495e15, "all_flops": 3.7e15,
        },
    }  # fmt: skip


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
        "texts": {
            "validation": {
                "loss": final,
                "perplexity": math.exp(final),
                "tokens": 65536,
                "low": final - 0.021,
                "high": final + 0.021,
                "per": "window",
            },
        },
        "tasks": {
            "blimp": {
                "metric": "acc",
                "value": 0.9 - final / 20,
                "stderr": 0.005,
                "low": 0.89 - final / 20,
                "high": 0.91 - final / 20,
                "samples": 4000,
                "few_shot": 0,
                "higher_is_better": True,
            },
        },
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
