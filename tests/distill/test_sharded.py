"""lm_heads that lie in two processes, each with rows of its own, against whole ones."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from losscases import LOSSES
from paretron.distill import fused
from paretron.distill.fused import DeferredLogits, fused_cross_entropy, fused_divergence
from paretron.distill.losses import IGNORE
from paretron.distill.vocabulary import Shard
from paretron.errors import Code, ParetronError
from paretron.families import LogitRule

TOKENS = 507
BOUNDS = ((0, 300), (300, 507))
PADDING = 6  # rows beyond the tokens, in the last shard
RULE = LogitRule(divisor=3.0, softcap=2.5)


def models(dtype: torch.dtype) -> tuple[DeferredLogits, DeferredLogits, Tensor]:
    random = torch.Generator().manual_seed(0)
    rows = TOKENS + PADDING

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(dtype)

    labels = torch.randint(TOKENS, (3, 11), generator=random)
    labels[1, 2:8] = IGNORE
    student = DeferredLogits(draw(3, 11, 16), draw(rows, 16), RULE, draw(rows), TOKENS)
    teacher = DeferredLogits(draw(3, 11, 24), draw(rows, 24), RULE, None, TOKENS)
    return student, teacher, labels


def leaf(x: DeferredLogits, rows: slice, shard: Shard | None = None) -> DeferredLogits:
    """Some rows of a head, all that takes part in the gradient as leaves."""
    hidden, weight = x.hidden.clone().requires_grad_(), x.weight[rows].clone().requires_grad_()
    bias = None if x.bias is None else x.bias[rows].clone().requires_grad_()
    return replace(x, hidden=hidden, weight=weight, bias=bias, shard=shard)


def loss_of(name: str | None, *args: object) -> list[Tensor]:
    """Loss and the gradients of hidden states, weight and bias."""
    student, teacher, labels = args
    assert isinstance(student, DeferredLogits)
    assert isinstance(teacher, DeferredLogits)
    assert isinstance(labels, Tensor)
    if name is None:
        loss = fused_cross_entropy(student, labels, normaliser=5.0)
    else:
        divergence = LOSSES[name][0](2.0)
        loss = fused_divergence(student, teacher, labels, divergence=divergence, normaliser=5.0)
    assert student.bias is not None
    leaves = (student.hidden, student.weight, student.bias)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def work(rank: int, meeting: Path) -> None:
    dist.init_process_group(
        "gloo", f"file://{meeting}", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    # Shards of different sizes would choose chunks of different sizes.
    fused._CHUNK_ELEMENTS["cpu"] = 3000
    group = dist.group.WORLD
    assert group is not None
    shard = Shard(group, *BOUNDS[rank])
    rows = slice(BOUNDS[rank][0], BOUNDS[rank][1] + rank * PADDING)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        student, teacher, labels = models(dtype)
        for name in [None, *LOSSES]:
            own = leaf(student, rows, shard), leaf(teacher, rows, shard).detach(), labels
            try:
                found = loss_of(name, *own)
            except ParetronError as error:
                assert name == "top_k"
                assert error.problems[0].code is Code.UNSUPPORTED
                continue
            assert name != "top_k"
            whole = leaf(student, slice(None)), teacher, labels
            value, hidden, weight, bias = loss_of(name, *whole)
            for a, b in zip(found, (value, hidden, weight[rows], bias[rows]), strict=True):
                assert float((a - b).abs().max()) <= tolerance * float(b.abs().max()), (name, dtype)
    dist.destroy_process_group()


def test_two_processes_with_uneven_shards_equal_one_head(tmp_path: Path) -> None:
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(n), str(tmp_path / "meet")], env=environment
        )
        for n in range(2)
    ]
    assert [p.wait(300) for p in processes] == [0, 0]


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
