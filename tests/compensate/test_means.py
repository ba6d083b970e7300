"""Refit to means: the smallest change that keeps them, and what it does to the residual stream."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from makers import PicoMaker
from paretron.artifacts.models import load_model
from paretron.compensate.means import Means
from paretron.recipe import Prune
from picocompensated import compensated, windows


@pytest.mark.parametrize("parts", [1, 3])
def test_it_is_the_smallest_matrix_that_gives_the_mean(parts: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(30, 12, generator=generator)
    y = torch.randn(30, 5, generator=generator)
    means = Means.zeros(12, 5)
    for some_a, some_y in zip(a.chunk(parts), y.chunk(parts), strict=True):
        means.add(some_a, some_y)
    wanted = torch.linalg.lstsq(a.double().mean(0)[None], y.double().mean(0)[None]).solution.T
    torch.testing.assert_close(means.solve(), wanted, rtol=1e-9, atol=1e-12)


def test_nothing_read_changes_nothing() -> None:
    means = Means.zeros(3, 2)
    means.add(torch.zeros(4, 3), torch.ones(4, 2))
    assert not means.solve().any()


@torch.no_grad()
def stream_means(folder: Path) -> torch.Tensor:
    """The mean of the stream behind every layer but the last, on the windows that are fitted to."""
    fitted = torch.stack(windows()[:-1])
    found = load_model(folder)(fitted, output_hidden_states=True, use_cache=False).hidden_states
    return torch.stack([states.double().mean((0, 1)) for states in found[1:-1]])


@pytest.mark.parametrize("new", [{"ffn": 40}, {"q_per_kv": 1}])
def test_the_mean_of_every_layers_stream_is_the_teachers(
    new: dict[str, int], pico: PicoMaker, tmp_path: Path
) -> None:
    model = pico("llama")
    for refit, name in ((False, "plain"), ("mean", "kept")):
        prune = Prune(dtype="float32", merge_heads=False)
        compensated(model, tmp_path / name, prune=prune, new=new, rotate=False, refit=refit)
    wanted, plain, kept = map(stream_means, (model, tmp_path / "plain", tmp_path / "kept"))
    assert (kept - wanted).abs().max() < 1e-5
    assert (plain - wanted).abs().max() > 1e-3
