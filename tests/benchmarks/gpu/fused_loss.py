"""The fused linear loss on a GPU against plain PyTorch and Liger-Kernel: JSON.

PYTHONPATH=tests python -m benchmarks.gpu.fused_loss

Forward and backward pass including the teacher's product, at 8192 tokens, student 3072, teacher
4096 and 128256 tokens of vocabulary in bf16. Transient memory is what a pass adds at its peak to
what is there before and after it: inputs and the gradients. Gradient errors are against fp64 on a
slice of the tokens. Targets for ours on an H200: 50 ms, 1.5 GB, and 1e-3 where the leaves are fp32
(autocast), whose gradients are not rounded to bf16. --small runs on a CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.shapes import machine
from benchmarks.losspeers import HeadLoss, drawn, fused, gradient_errors, peers, versions

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def measure(loss: HeadLoss, inputs: Inputs, *, warmups: int, repeats: int) -> dict[str, Any]:
    """Median and least seconds of a pass, and the memory that it adds."""
    on_gpu = inputs[0].is_cuda
    seconds, transient = [], 0
    for turn in range(warmups + repeats):
        for x in inputs[:2]:
            x.grad = None
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        loss(*inputs).backward()
        if on_gpu:
            torch.cuda.synchronize()
        if turn < warmups:
            continue
        seconds.append(time.perf_counter() - started)
        if on_gpu:
            left = torch.cuda.memory_allocated()
            transient = max(transient, torch.cuda.max_memory_allocated() - left)
    tokens, student = inputs[0].shape
    vocab, teacher = inputs[3].shape
    flops = 2 * tokens * vocab * (3 * student + teacher)
    median = statistics.median(seconds)
    return {
        "ms": 1e3 * median,
        "least_ms": 1e3 * min(seconds),
        "tflop_s": flops / median / 1e12,
        "transient_gb": transient / 1e9,
    }


def autocast_fused(*inputs: Tensor) -> Tensor:
    """Ours with fp32 leaves that hold bf16 numbers, as mixed-precision training has them."""
    with torch.autocast(inputs[0].device.type, dtype=torch.bfloat16):
        return fused(*inputs)


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--student", type=int, default=3072)
    parser.add_argument("--teacher", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--small", action="store_true")
    a = parser.parse_args()
    device = "cpu" if a.small else "cuda"
    shape = (64, 48, 64, 640) if a.small else (a.tokens, a.student, a.teacher, a.vocab)
    inputs = drawn(*shape, dtype=torch.bfloat16, device=device)
    report: dict[str, Any] = machine() | {"shape": shape, "versions": versions(), "codes": {}}
    slice_of = (inputs[0][:256].detach().requires_grad_(), inputs[1], inputs[2][:256], inputs[3])
    for name, make in peers().items():
        if a.small and name.startswith("liger"):
            continue
        try:
            loss = make()
            found = measure(loss, inputs, warmups=3, repeats=1 if a.small else a.repeats)
            inputs[0].grad = inputs[1].grad = None
            errors = gradient_errors(slice_of, loss)
            report["codes"][name] = found | {"gradient_errors": errors}
        except torch.OutOfMemoryError as error:
            report["codes"][name] = {"out of memory": str(error).split(".")[0]}
    hidden, weight = (x.detach().float().requires_grad_() for x in slice_of[:2])
    wide = (hidden, weight, slice_of[2], slice_of[3])
    report["gradient_errors of ours, fp32 leaves"] = gradient_errors(wide, autocast_fused)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
