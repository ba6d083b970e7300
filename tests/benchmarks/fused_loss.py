"""The fused linear loss against plain PyTorch and Liger-Kernel on a CPU: time, memory, accuracy.

PYTHONPATH=tests python -m benchmarks.fused_loss --tokens 2048 --hidden 768 --vocab 32000

Each code has a process of its own; they take turns, so that a busy machine slows all alike. Ratios
are medians over turns. Liger-Kernel takes part where it is installed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.losspeers import drawn, gradient_errors, peers, versions


def serve(pipe: Connection, name: str, tokens: int, size: int, vocab: int) -> None:
    """One forward and backward pass whenever asked: CPU and wall seconds, added memory, loss."""
    loss = peers()[name]()
    inputs = drawn(tokens, size, size, vocab, dtype=torch.float32, device="cpu")
    loss(*inputs).backward()  # libraries are loaded and code compiled before anything is measured
    while pipe.recv():
        for x in inputs:
            x.grad = None
        ctypes.CDLL(None).malloc_trim(0)  # what the turn before left is not there to be used again
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident("VmRSS")
        wall, cpu = time.perf_counter(), time.process_time()
        result = loss(*inputs)
        result.backward()
        pipe.send(
            {
                "cpu_s": time.process_time() - cpu,
                "wall_s": time.perf_counter() - wall,
                "peak_mb": (resident("VmHWM") - before) / 2**20,
                "loss": float(result.detach()),
            }
        )


def resident(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def measured(tokens: int, size: int, vocab: int, turns: int) -> dict[str, list[dict[str, float]]]:
    """What every code took in every turn."""
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for name in peers():
        pipes[name], theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, name, tokens, size, vocab), daemon=True).start()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in pipes}
    for _ in range(turns):
        for name, pipe in pipes.items():
            pipe.send(True)
            found[name].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send(False)
    return found


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--turns", type=int, default=5)
    a = parser.parse_args()
    found = measured(a.tokens, a.hidden, a.vocab, a.turns)

    def ratio(name: str, key: str) -> float:
        pairs = zip(found[name], found["plain"], strict=True)
        return statistics.median(own[key] / other[key] for own, other in pairs)

    small = drawn(256, 128, 192, 8000, dtype=torch.bfloat16, device="cpu")
    report = {
        "shape": [a.tokens, a.hidden, a.vocab],
        "threads": torch.get_num_threads(),
        "turns": a.turns,
        "versions": versions(),
        "codes": {
            name: {
                **{key: statistics.median(turn[key] for turn in turns) for key in turns[0]},
                **{f"{key} ratio": ratio(name, key) for key in ("cpu_s", "wall_s", "peak_mb")},
            }
            for name, turns in found.items()
        },
        # At 256 x 128 (192) x 8000. A gradient that is stored in bf16 cannot do better than 1.7e-3.
        "bf16 gradient errors": {name: gradient_errors(small, peers()[name]()) for name in found},
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
