"""Tokens a second and MFU of a distillation on one GPU: JSON.

PYTHONPATH=tests python -m benchmarks.gpu.training --micro-batch 2

A Llama-3.1-8B-shaped teacher (random weights, bf16) and the 4B width student (fp32 weights, bf16
arithmetic) at sequence length 4096, through the project's own steps. Target on an H200: MFU of 45 %
and more, the teacher's forward pass counted. --small runs on a CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.shapes import (
    LLAMA_8B,
    PICO,
    PICO_STUDENT,
    WIDTH_4B,
    machine,
    random_llama,
    random_tokens,
)
from paretron.distill.batches import Windows
from paretron.distill.divergences import ForwardKL
from paretron.distill.loop import Trainer
from paretron.distill.objective import Objective, Teacher
from paretron.distill.parallel import checkpoint_layers
from paretron.distill.state import StateFolder
from paretron.recipe import Distill
from paretron.workers.stop import StopRequest
from paretron.workers.world import World


def trainer_of(a: argparse.Namespace, work: Path, heard: list[Mapping[str, object]]) -> Trainer:
    """A training of a few steps, of which nothing is saved."""
    device = "cpu" if a.small else "cuda"
    shapes = (PICO, PICO_STUDENT) if a.small else (LLAMA_8B, WIDTH_4B)
    seq_len = 32 if a.small else a.seq_len
    teacher = random_llama(shapes[0], dtype=torch.bfloat16, device=device)
    student = random_llama(shapes[1], dtype=torch.float32, device=device)
    if a.checkpoint:
        checkpoint_layers(student)
    settings = Distill(
        tokens=(a.warmups + a.steps) * a.global_batch * seq_len,
        global_batch=a.global_batch,
        micro_batch=a.micro_batch,
        warmup_steps=1,
        dtype="bfloat16",
    )
    store = random_tokens(work / "tokens", vocab=shapes[0]["vocab_size"], count=settings.tokens)

    def hear(kind: str, fields: Mapping[str, object]) -> None:
        if kind == "step":
            heard.append(fields)

    world = World(0, 1, torch.device(device))
    return Trainer(
        objective=Objective(student, divergence=ForwardKL()),
        teacher=Teacher(teacher),
        alpha="dynamic",
        train_windows=Windows(store, seq_len, shapes[0]["vocab_size"]),
        validation_windows=None,
        settings=settings,
        seed=0,
        world=world,
        state=StateFolder(work / "state", {}, world, hear),
        stop=StopRequest(),
        on_event=hear,
    )


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--global-batch", type=int, default=8)
    parser.add_argument("--warmups", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--checkpoint", action="store_true", help="activation checkpointing")
    parser.add_argument("--small", action="store_true")
    a = parser.parse_args()
    heard: list[Mapping[str, object]] = []
    with tempfile.TemporaryDirectory() as work:
        trainer = trainer_of(a, Path(work), heard)
        seconds = []
        for _ in range(a.warmups + a.steps):
            started = time.perf_counter()
            trainer.train_step()  # it reads the loss, so the device is done when it returns
            seconds.append(time.perf_counter() - started)
        seq_len = trainer.train_windows.seq_len
        rate = a.global_batch * seq_len / statistics.median(seconds[a.warmups :])
        report: dict[str, Any] = machine() | {
            "seq_len": seq_len,
            "micro_batch": a.micro_batch,
            "global_batch": a.global_batch,
            "checkpoint": a.checkpoint,
            "seconds": seconds,
            "tokens_per_s": rate,
            **trainer.meter.figures(tokens_per_s=rate, seq_len=seq_len),
            "losses": [step["loss"] for step in heard],
        }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
