"""Scoring of the Llama-3.1-8B shape on one GPU with 1024 x 4096 tokens: JSON.

PYTHONPATH=tests python -m benchmarks.gpu.scoring --folder /data/scoring

Random weights in bf16, written to the folder once (16 GB). Target on an H200: 100 s, and a pass of
the same model without scoring is timed beside it. --small runs on a CPU.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from benchmarks.gpu.shapes import LLAMA_8B, PICO, machine, random_llama
from paretron.artifacts.reader import Checkpoint
from paretron.importance.score import score_windows
from paretron.recipe import Score


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--small", action="store_true")
    a = parser.parse_args()
    device = "cpu" if a.small else "cuda"
    shape = PICO if a.small else LLAMA_8B
    samples, seq_len = (8, 32) if a.small else (a.samples, a.seq_len)
    model = random_llama(shape, dtype=torch.bfloat16, device=device)
    if not (a.folder / "config.json").exists():
        model.save_pretrained(a.folder)
    windows = torch.randint(3, shape["vocab_size"], (samples, seq_len))

    started = time.perf_counter()
    with torch.no_grad():
        for part in windows.split(a.micro_batch):
            hidden = model.base_model(part.to(device), use_cache=False).last_hidden_state
    float(hidden.sum())
    plain_s = time.perf_counter() - started
    del model, hidden
    if not a.small:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    settings = Score(micro_batch=a.micro_batch, placement="resident")
    started = time.perf_counter()
    scores = score_windows(Checkpoint.open(a.folder), list(windows), score=settings)
    score_s = time.perf_counter() - started
    report = machine() | {
        "samples": samples,
        "seq_len": seq_len,
        "micro_batch": a.micro_batch,
        "plain_s": plain_s,
        "score_s": score_s,  # with the reading of the weights
        "ratio": score_s / plain_s,
        "tokens_per_s": samples * seq_len / score_s,
        "memory_gb": 0.0 if a.small else torch.cuda.max_memory_allocated() / 1e9,
        "num_samples": scores.info.samples,
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
