"""Streamed layer by layer: the same scores as a model in memory, every weight read once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from makers import PicoMaker
from paretron.artifacts.models import load_model
from paretron.artifacts.reader import Checkpoint
from paretron.importance.collect import Observed, batches_of, observe
from paretron.importance.executor import LayerStack
from paretron.importance.states import HiddenStates
from paretron.importance.stream import StreamedStack
from paretron.importance.taps import find_taps
from pico import PICO_FAMILIES

LENGTHS = (20, 33, 7, 20, 1)
CPU = torch.device("cpu")


def _windows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 320, (n,), generator=generator) for n in LENGTHS]


def _observe(stack: LayerStack, checkpoint: Checkpoint, states: HiddenStates | None) -> Observed:
    return observe(
        stack, checkpoint.config, batches_of(_windows(), 2), block_sizes=(1, 3), states=states
    )


@pytest.mark.parametrize("family", PICO_FAMILIES)
@pytest.mark.parametrize("memory_bytes", [None, 10_000])
def test_streamed_equals_resident(
    pico: PicoMaker, tmp_path: Path, family: str, memory_bytes: int | None
) -> None:
    checkpoint = Checkpoint.open(pico(family))
    resident = LayerStack(load_model(checkpoint.path), checkpoint.family)
    streamed = StreamedStack(checkpoint, dtype=torch.float32, device=CPU)
    whole = _observe(resident, checkpoint, None)
    with HiddenStates(memory_bytes=memory_bytes, folder=tmp_path / "state") as states:
        other = _observe(streamed, checkpoint, states)
        assert (states.spilled_bytes > 0) == (memory_bytes is not None)
    assert not list((tmp_path / "state").glob("*"))
    assert other.tokens == whole.tokens
    for axis, statistics in whole.axes.items():
        assert torch.equal(other.axes[axis].sums, statistics.sums)
        assert torch.equal(other.axes[axis].squares, statistics.squares)
    for n in (1, 3):
        assert torch.equal(other.distances[n], whole.distances[n])
    head = sum(e.nbytes for name, e in checkpoint.entries.items() if name.startswith("lm_head"))
    assert streamed.bytes_read == checkpoint.nbytes - head


@pytest.mark.parametrize("tied", [False, True])
def test_loss_needs_the_head_and_nothing_stays(pico: PicoMaker, tied: bool) -> None:
    checkpoint = Checkpoint.open(pico("qwen2", tie_word_embeddings=tied))
    resident = LayerStack(load_model(checkpoint.path), checkpoint.family)
    streamed = StreamedStack(checkpoint, dtype=torch.float32, device=CPU)
    (batch,) = batches_of(_windows(), len(LENGTHS))
    losses = []
    for stack in (resident, streamed):
        with torch.no_grad(), stack.loaded("embeddings"):
            prepared = stack.prepare(batch.ids_BT)
        hidden = prepared.hidden_BTD
        for i in range(len(stack)):
            with torch.no_grad(), stack.loaded(i):
                hidden = stack.run_layer(i, prepared, hidden)
        with torch.no_grad(), stack.loaded("head"):
            losses.append(stack.loss_sum(hidden, batch.targets()))
    assert losses[0] == losses[1]
    left = [n for n, p in streamed.model.named_parameters() if p.device.type == "cpu"]
    norms = {t.module for t in find_taps(checkpoint.family, checkpoint.config)}
    assert {n.rsplit(".", 1)[0] for n in left} <= norms
