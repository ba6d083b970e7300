"""Rotating the residual stream: exact where the table says so, told where it is not."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

from makers import PicoMaker
from paretron.artifacts.models import load_model
from paretron.artifacts.reader import Checkpoint
from paretron.compensate.basis import covariance_sum, principal_basis, spreading
from paretron.compensate.decide import decide
from paretron.compensate.residual import refit_limit, role_of, rotation_limit
from paretron.families import FAMILIES, parameter_counts, sizes
from paretron.recipe import Compensate
from pico import MOE_FAMILIES, PICO_FAMILIES, pico_model
from picocompensated import compensated, logits

EXACT = [f for f in (*PICO_FAMILIES, *MOE_FAMILIES) if not rotation_limit(FAMILIES[f])]
BIASED: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "nemotron": {"attention_bias": True, "mlp_bias": True},
}


def test_families_with_norms_over_what_is_written_are_the_ones_that_cannot() -> None:
    inexact = {name for name, family in FAMILIES.items() if rotation_limit(family)}
    assert inexact == {"gemma2", "gemma3_text", "olmo2"}
    assert inexact == {name for name, family in FAMILIES.items() if refit_limit(family)}


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize(
    ("family", "config"),
    [*((f, {}) for f in EXACT), *BIASED.items(), ("qwen3", {"tie_word_embeddings": True})],
)
def test_rotation_oracle(
    pico: PicoMaker, family: str, config: dict[str, Any], spread: bool
) -> None:
    """Rotated and not pruned, a model computes what it did."""
    model = pico(family, **config)
    out = model.parent / "out"
    figures = compensated(model, out, rotate=True, refit=False, spread=spread, count=4)
    assert figures["kept_energy"] == pytest.approx(1)
    before = logits(model)
    assert float((logits(out) - before).abs().max() / before.abs().max()) < 1e-5
    checkpoint, source = Checkpoint.open(out), Checkpoint.open(model)
    name = "model.layers.1.self_attn.o_proj.weight"
    assert float((checkpoint.read(name) - source.read(name)).abs().max()) > 0.1


@pytest.mark.parametrize("family", EXACT)
def test_a_norm_that_is_not_folded_is_noticed(
    pico: PicoMaker, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle itself can fail: without the norms' weights the logits move."""
    from paretron.compensate.trimmed import Trimmed

    real = Trimmed.gamma
    monkeypatch.setattr(
        Trimmed,
        "gamma",
        lambda self, name, layer: (
            torch.ones_like(real(self, name, layer)) if layer == 1 else real(self, name, layer)
        ),
    )
    model = pico(family)
    compensated(model, model.parent / "out", rotate=True, refit=False, count=2)
    before = logits(model)
    moved = float((logits(model.parent / "out") - before).abs().max() / before.abs().max())
    assert moved > 1e-3


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_rotation_keeps_more_than_channels_do(pico: PicoMaker, family: str) -> None:
    """On a model whose stream lies in a subspace, pruning down to it loses nothing at all."""
    model = pico(family)
    _flatten(model, family, rank=40)
    out = model.parent / "out"
    figures = compensated(model, out, new={"hidden": 48}, rotate=True, refit=False, count=4)
    assert figures["kept_energy"] == pytest.approx(1)
    before = logits(model)
    # What is added to the mean square under the root is now of fewer channels: not exactly equal.
    assert float((logits(out) - before).abs().max() / before.abs().max()) < 1e-3
    loss = figures["loss"]
    assert loss["compensated"] == pytest.approx(loss["teacher"], abs=1e-3)
    assert abs(loss["plain"] - loss["teacher"]) > 1e-2


def _flatten(folder: Any, family: str, *, rank: int) -> None:
    """Let everything that is written into the stream lie in a random subspace."""
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(64, rank, generator=generator)).Q
    project = basis @ basis.T
    table = {t.name: role_of(FAMILIES[family], t) for t in FAMILIES[family].tensors}
    for name, tensor in state.items():
        role = table[re.sub(r"layers\.\d+\.", "layers.{i}.", name)]
        if role == "embedding":
            state[name] = (tensor @ project).contiguous()
        elif role == "writer":
            state[name] = (project @ tensor).contiguous()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_covariances_merge() -> None:
    x = torch.randn(100, 12, generator=torch.Generator().manual_seed(0))
    for norm in ("rms", "layernorm"):
        whole = covariance_sum(x, norm=norm)
        parts = covariance_sum(x[:33], norm=norm) + covariance_sum(x[33:], norm=norm)
        torch.testing.assert_close(whole, parts, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 7, 48, 64])
def test_spreading_is_orthogonal_and_flat(size: int) -> None:
    matrix = spreading(size, seed=4)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    assert float(matrix.abs().max()) <= (2 / size) ** 0.5 + 1e-12


def test_layernorm_basis_keeps_the_mean() -> None:
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(1)) + 3
    covariance = covariance_sum(x, norm="layernorm")
    for seed in (None, 5):
        basis, _ = principal_basis(covariance, 10, norm="layernorm", spread_seed=seed)
        torch.testing.assert_close(basis @ basis.T, torch.eye(10, dtype=torch.float64))
        centred = (x - x.mean(-1, keepdim=True)).double() @ basis.T
        assert float(centred.mean(-1).abs().max()) < 1e-6  # the mean stays a mean


def test_tied_falls_back_and_can_be_untied(pico: PicoMaker) -> None:
    model = pico("qwen3", tie_word_embeddings=True)
    checkpoint = Checkpoint.open(model)
    have = sizes(checkpoint.family, checkpoint.config)
    settings = {"sizes": have, "new": have | {"hidden": 48}}
    auto = decide(checkpoint.family, checkpoint.config, settings=Compensate(), **settings)
    assert not auto.rotate
    assert auto.refit
    assert "15360 parameters more" in " ".join(auto.notes)  # 320 rows of 48
    asked = decide(
        checkpoint.family, checkpoint.config, settings=Compensate(rotate=True), **settings
    )
    assert asked.untie
    assert asked.extra_params == 320 * 48
    out = model.parent / "out"
    compensated(model, out, new={"hidden": 48}, rotate=True)
    written = Checkpoint.open(out)
    assert written.config["tie_word_embeddings"] is False
    tied = dict(written.config) | {"tie_word_embeddings": True}
    more = parameter_counts(written.family, written.config).total
    assert more - parameter_counts(written.family, tied).total == asked.extra_params
    selected = model.parent / "selected"
    figures = compensated(model, selected, new={"hidden": 48})
    assert "lm_head.weight" not in Checkpoint.open(selected).entries
    assert not figures["rotated"]


def test_what_cannot_be_is_a_problem_only_when_asked_for() -> None:
    config = pico_model("gemma2").config.to_dict()
    family = FAMILIES["gemma2"]
    have = sizes(family, config)
    new = have | {"hidden": 48}
    auto = decide(family, config, sizes=have, new=new, settings=Compensate())
    assert not auto.any
    assert not auto.problems
    assert len(auto.notes) == 2
    asked = Compensate(rotate=True, refit=True)
    found = decide(family, config, sizes=have, new=new, settings=asked)
    assert [p.where for p in found.problems] == ["compensate.rotate", "compensate.refit"]


def test_the_checkpoint_that_is_written_computes_what_was_measured(pico: PicoMaker) -> None:
    """The held samples' loss, computed layer by layer, is that of the reloaded checkpoint."""
    from picocompensated import windows

    model = pico("llama")
    out = model.parent / "out"
    figures = compensated(model, out, new={"hidden": 48, "ffn": 64, "layers": 3})
    held = torch.stack(windows(8)[-1:])
    with torch.no_grad():
        loss = load_model(out)(held, labels=held, use_cache=False).loss
    assert float(loss) == pytest.approx(figures["loss"]["compensated"], abs=1e-5)
    assert json.loads((out / "config.json").read_text())["hidden_size"] == 48


@pytest.mark.parametrize(
    ("family", "kept"),
    [("nemotron", ["layers.{i}.input", "layers.{i}.post", "model.norm"]),
     ("starcoder2", ["model.norm"]), ("llama", [])],
)  # fmt: skip
def test_biases_that_are_partly_lost_are_named(family: str, kept: list[str]) -> None:
    config = pico_model(family).config.to_dict()
    have = sizes(FAMILIES[family], config)
    settings = Compensate(rotate=True)

    def notes(new: dict[str, int]) -> str:
        found = decide(FAMILIES[family], config, sizes=have, new=have | new, settings=settings)
        return " ".join(n for n in found.notes if "biases" in n)

    said = notes({"hidden": 48})
    assert all(name in said for name in kept)
    assert bool(said) == bool(kept)
    assert said.count("layernorm") == (2 if family == "nemotron" else 0)
    assert not notes({})  # a whole rotation loses nothing
