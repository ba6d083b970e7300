"""Bounds against what is known and against what is attained here: JSON lines.

PYTHONPATH=tests python -m benchmarks.roofline

 - probe: its bandwidth and float32 rate beside numpy's dot product of a vector with itself (which
   reads it once) and product of matrices, timed by hand in turns;
 - attained: decode steps and prefill of a random Llama that no cache holds, through transformers;
 - published: TensorRT-LLM's output tokens/s of Llama-3.1-8B in FP8 on H100 and H200 beside the
   bound at the largest batch that fits, and the speedups of the 4B shapes beside the papers'.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.shapes import random_llama
from paretron.recipe import Engine, Profile
from paretron_profiling.measure import profile_models, with_bounds
from paretron_profiling.models import ModelFacts, ModelUnderTest
from paretron_profiling.roofline.bounds import Costs, Formats
from paretron_profiling.roofline.devices import Device, device_of
from paretron_profiling.roofline.predict import Load, predict
from paretron_profiling.roofline.probe import probe_device
from published import LLAMA

WIDTH = LLAMA | {"hidden_size": 3072, "intermediate_size": 9216}
DEPTH = LLAMA | {"num_hidden_layers": 16}
# Output tokens/s of TensorRT-LLM 1.0, FP8, one GPU, by (input, output) tokens: as its makers say.
PUBLISHED = {
    "H100": {
        (128, 128): 28312, (128, 2048): 22714, (128, 4096): 14325, (500, 2000): 17660,
        (1000, 1000): 15220, (2048, 128): 3450, (2048, 2048): 9305, (5000, 500): 3459,
        (20000, 2000): 1351,
    },
    "H200": {
        (128, 128): 27911, (128, 2048): 26221, (128, 4096): 18027, (500, 2000): 20770,
        (1000, 1000): 17744, (2048, 128): 3538, (2048, 2048): 12194, (5000, 500): 3902,
        (20000, 2000): 1804,
    },
}  # fmt: skip
MEMORY_SHARE, MOST_BATCH = 0.9, 2048  # what such a server is given
# About 480 MB of float32, and two students of about half.
SHAPE = {
    "vocab_size": 4096, "hidden_size": 1024, "num_hidden_layers": 8, "intermediate_size": 4096,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64,
    "max_position_embeddings": 1024, "tie_word_embeddings": False,
}  # fmt: skip
SHAPES = {
    "teacher": SHAPE,
    "width": SHAPE | {"hidden_size": 768, "intermediate_size": 2560},
    "depth": SHAPE | {"num_hidden_layers": 4},
}


def main() -> None:
    """Print one line for each comparison."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true", help="tiny models, to see that it runs")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for line in (*probes(asked.small), *attained(asked.small), *published()):
        print(json.dumps(line), flush=True)


def probes(small: bool) -> Iterator[dict[str, Any]]:
    """The probe and numpy in turns, each the best of its turns."""
    turns = 1 if small else 5
    n = 1024
    matrix = np.random.default_rng(0).standard_normal((n, n), dtype=np.float32)
    found: list[Device] = []
    reads: list[float] = []
    products: list[float] = []
    for _ in range(turns):
        found.append(probe_device())
        values = np.ones(found[-1].bandwidths[-1][0] // 4, dtype=np.float32)
        reads.append(values.nbytes / _best(partial(np.dot, values, values)))
        del values
        products.append(2 * n**3 / _best(partial(np.matmul, matrix, matrix)))
    rates = [d.flop_s["float32"] or 0.0 for d in found]
    yield {
        "about": "probe", "device": found[0].name, "turns": turns,
        "bandwidth_bytes_s": [d.bandwidth_bytes_s for d in found], "numpy_dot_bytes_s": reads,
        "float32_flop_s": rates, "numpy_flop_s": products,
        "bandwidth_to_numpy": max(d.bandwidth_bytes_s for d in found) / max(reads),
        "rate_to_numpy": max(rates) / max(products),
        "launch_s": median(d.launch_s or 0.0 for d in found),
    }  # fmt: skip


def attained(small: bool) -> Iterator[dict[str, Any]]:
    """The share of each bound that transformers attains with models larger than the caches."""
    change = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 640} if small else {}
    with tempfile.TemporaryDirectory() as place:
        models = []
        for name, shape in SHAPES.items():
            folder = Path(place) / name
            made = random_llama(shape | change, dtype=torch.float32, device="cpu")
            made.save_pretrained(folder)
            models.append(ModelUnderTest(name, name, {"hf": folder}, ModelFacts.of(folder)))
        profile = Profile(
            engines=(Engine(name="transformers"),), batches=(1, 4), lengths=((32, 9),),
            repeats=1 if small else 3,
        )  # fmt: skip
        result = profile_models(models, profile=profile)
        found = with_bounds(result, models, on_event=lambda kind, fields: None)
    roofline = found.roofline or {}
    for row in roofline["rows"]:
        keys = ("model", "load", "phase", "limited_by", "bound_s", "measured_s", "attained")
        yield {"about": "attained"} | {key: row[key] for key in keys}
    for one in roofline["speedup"]:
        yield {"about": "speedup"} | one
    for line in roofline["overheads"]:
        yield {"about": "overhead"} | line


def published() -> Iterator[dict[str, Any]]:
    """The bound of the 8B and of both 4B shapes where throughput of the 8B is published."""
    formats = Formats.of("fp8", kv="fp8")
    costs = {
        name: Costs.of(config, formats=formats)
        for name, config in (("8B", LLAMA), ("width", WIDTH), ("depth", DEPTH))
    }
    for name, figures in PUBLISHED.items():
        device = device_of(name)
        for lengths, tok_s in figures.items():
            made = {m: predict(m, c, device, load=_fullest(c, device, lengths))
                    for m, c in costs.items()}  # fmt: skip
            rates = {m: p.output_tok_s for m, p in made.items()}
            yield {
                "about": "published", "device": name, "lengths": lengths, "tok_s": tok_s,
                "bound_tok_s": rates["8B"], "attained": tok_s / rates["8B"],
                "batches": {m: p.load.batch for m, p in made.items()},
                "decode_limited_by": {m: p.decode.limited_by for m, p in made.items()},
                "width_speedup": rates["width"] / rates["8B"],
                "depth_speedup": rates["depth"] / rates["8B"],
            }  # fmt: skip
    h100 = device_of("H100")
    for lengths in ((128, 128), (2048, 128), (2048, 2048)):
        base = predict("8B", costs["8B"], h100, load=Load(32, *lengths)).output_tok_s
        for batch in (32, 64):
            yield {
                "about": "papers", "lengths": lengths, "batch": batch, "teacher_batch": 32,
                "papers": {"width": 1.8, "depth": 2.7},
            } | {
                m: predict(m, costs[m], h100, load=Load(batch, *lengths)).output_tok_s / base
                for m in ("width", "depth")
            }  # fmt: skip


def _fullest(costs: Costs, device: Device, lengths: tuple[int, int]) -> Load:
    room = MEMORY_SHARE * (device.memory_bytes or 0) - costs.weight_bytes
    return Load(min(MOST_BATCH, int(room // costs.kv_bytes_at(sum(lengths)))), *lengths)


def _best(call: Callable[[], object], *, times: int = 5) -> float:
    call()
    found = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return min(found)


if __name__ == "__main__":
    main()
