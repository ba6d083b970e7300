"""The fused linear loss against the plain one on whole logits: time and peak memory, as JSON.

python tests/benchmarks/fused_loss.py --tokens 2048 --hidden 768 --vocab 32000
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from collections.abc import Callable

import torch

from paretron.distill.fused import DeferredLogits, fused_divergence
from paretron.distill.losses import forward_kl


def plain(
    hidden: torch.Tensor, weight: torch.Tensor, teacher: torch.Tensor, head: torch.Tensor
) -> torch.Tensor:
    """The reference: both models' logits at once."""
    return forward_kl(hidden @ weight.t(), teacher @ head.t()) / len(hidden)


def fused(
    hidden: torch.Tensor, weight: torch.Tensor, teacher: torch.Tensor, head: torch.Tensor
) -> torch.Tensor:
    """The loss that never holds them."""
    student, other = DeferredLogits(hidden, weight), DeferredLogits(teacher, head)
    labels = torch.zeros(len(hidden), dtype=torch.int64)
    return fused_divergence(student, other, labels, normaliser=len(hidden))


def measure(name: str, tokens: int, size: int, vocab: int, repeats: int) -> dict[str, float]:
    """Best time of a forward and backward pass, and the memory it adds, in a process of its own."""
    loss: Callable[..., torch.Tensor] = {"plain": plain, "fused": fused}[name]
    torch.manual_seed(0)
    hidden = torch.randn(tokens, size, requires_grad=True)
    weight = (torch.randn(vocab, size) * size**-0.5).requires_grad_()
    teacher, head = torch.randn(tokens, size), torch.randn(vocab, size) * size**-0.5
    small = [t[:64].detach().requires_grad_() for t in (hidden, weight)]
    loss(*small, teacher[:64], head[:64]).backward()  # libraries are loaded before memory is read
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    best, value = float("inf"), 0.0
    for _ in range(repeats):
        hidden.grad = weight.grad = None
        start = time.perf_counter()
        result = loss(hidden, weight, teacher, head)
        result.backward()
        best, value = min(best, time.perf_counter() - start), float(result.detach())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": best, "peak_mb": peak / 1024, "loss": value}


def main() -> None:
    """Print one JSON object: both measurements and their ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--repeats", type=int, default=4)
    a = parser.parse_args()
    found = {}
    for name in ("plain", "fused"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[name] = pool.apply(measure, (name, a.tokens, a.hidden, a.vocab, a.repeats))
    report = {
        "shape": [a.tokens, a.hidden, a.vocab],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **found,
        "time_ratio": found["fused"]["seconds"] / found["plain"]["seconds"],
        "memory_ratio": found["fused"]["peak_mb"] / found["plain"]["peak_mb"],
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
