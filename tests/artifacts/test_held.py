"""Parameters in memory against tensors on disk: the same bits both ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from makers import PicoMaker
from paretron.artifacts.held import in_memory, on_disk
from paretron.artifacts.models import load_model
from paretron.artifacts.reader import Checkpoint


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {}),
        ("mixtral", {"num_local_experts": 12}),
        ("qwen3_moe", {"num_experts": 12}),
    ],
)
def test_a_loaded_model_is_the_disk_and_back(
    pico: PicoMaker, family: str, config: dict[str, Any]
) -> None:
    checkpoint = Checkpoint.open(pico(family, num_hidden_layers=2, **config))
    state = load_model(checkpoint.path).state_dict()
    tensors = on_disk(state, checkpoint.family, checkpoint.config)
    assert tensors.keys() == checkpoint.entries.keys()
    assert all(torch.equal(t, checkpoint.read(n)) for n, t in tensors.items())
    again = in_memory(tensors, checkpoint.family, checkpoint.config)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[n], t) for n, t in state.items())
