"""Norms over writes: embeddings and writes stay in proportion when channels of the stream go.

Gemma 3 and OLMo 2 have norms on query and key too, so the scale of what attention reads does not
matter, and its write can be compared exactly: before the next norm only the direction counts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from makers import PicoMaker
from paretron.artifacts.models import load_model
from paretron.artifacts.reader import Checkpoint
from paretron.surgery import cut
from picoscores import IDS, prune_to

# Where the stream is read next after the first layer's attention.
READS = {"gemma3_text": "pre_feedforward_layernorm", "olmo2": "mlp"}
Prepare = Callable[[Path], None]


def _silence(model: Path, *, rows: bool) -> None:
    """The first 24 channels get no embedding, and with `rows` no write either."""
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][:, :24] = 0
    if rows:
        weights["model.layers.0.self_attn.o_proj.weight"][:24] = 0
    save_file(weights, model / "model.safetensors", {"format": "pt"})


@torch.no_grad()
def _stream(model: Path, family: str) -> torch.Tensor:
    """What is read after the first layer's attention, [tokens, hidden]."""
    network, seen = load_model(model), []
    layer = network.get_submodule("model.layers.0")
    layer.get_submodule(READS[family]).register_forward_pre_hook(lambda _m, a: seen.append(a[0]))
    network(IDS, use_cache=False)
    return torch.cat(list(seen[0]))


def _turned(model: Path, out: Path, family: str) -> float:
    """The mean angle between the pruned stream and the same channels of the whole one, rad."""
    selection = prune_to(model, out, hidden=40)
    kept = selection.shared["hidden"]
    whole = _stream(model, family)[:, kept]
    return float(
        torch.acos(torch.cosine_similarity(_stream(out, family), whole).clamp(-1, 1)).mean()
    )


@pytest.fixture
def pruned_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores that give up the first 24 channels."""
    import picoscores

    scores = picoscores.random_scores

    def ascending(checkpoint: Checkpoint, *, seed: int = 0) -> object:
        made = scores(checkpoint, seed=seed)
        hidden = made.statistics["hidden"]
        hidden.sums[:] = torch.arange(64).double()
        hidden.squares[:] = hidden.sums.square()
        return made

    monkeypatch.setattr(picoscores, "random_scores", ascending)


@pytest.mark.parametrize("family", READS)
@pytest.mark.parametrize("rows", [True, False])
def test_the_stream_keeps_its_direction(
    family: str, rows: bool, pico: PicoMaker, tmp_path: Path, pruned_last: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model = pico(family, num_hidden_layers=1)
    _silence(model, rows=rows)
    turned = _turned(model, tmp_path / "balanced", family)
    limit = 2e-3 if rows else 0.05  # the share of energy is exact only where it is all
    assert turned < limit
    monkeypatch.setattr(cut, "balanced_norm", lambda weight, **_: weight)
    bare = _turned(model, tmp_path / "bare", family)
    # Where the pruned channels were silent Gemma's embeddings and writes shrink alike; where they
    # were like the others OLMo's writes stay as they are.
    alike = rows == (family == "gemma3_text")
    assert bare < limit if alike else bare > 3 * turned


def test_nothing_changes_where_the_width_stays(pico: PicoMaker, tmp_path: Path) -> None:
    model = pico("gemma2")
    prune_to(model, tmp_path / "out", ffn=40, kv_heads=1)
    name = "model.layers.1.post_feedforward_layernorm.weight"
    before, after = Checkpoint.open(model), Checkpoint.open(tmp_path / "out")
    assert torch.equal(before.read(name), after.read(name))


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_only_the_norms_over_writes_are_scaled(
    family: str, pico: PicoMaker, tmp_path: Path
) -> None:
    model = pico(family)
    kept = prune_to(model, tmp_path / "out", hidden=40).shared["hidden"]
    before, after = Checkpoint.open(model), Checkpoint.open(tmp_path / "out")
    scaled = {
        name.split(".", 3)[-1]
        for name, entry in after.entries.items()
        if len(entry.shape) == 1
        and entry.shape == (40,)
        and not torch.equal(before.read(name)[kept], after.read(name))
    }
    assert scaled == {"post_attention_layernorm.weight", "post_feedforward_layernorm.weight"}
