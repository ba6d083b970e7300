"""Ridge refit: the normal equations, the order of fitting, what it does to the layers' outputs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from makers import PicoMaker
from paretron.artifacts.models import load_model
from paretron.artifacts.reader import Checkpoint
from paretron.compensate.moments import Moments
from paretron.families import sizes
from paretron.recipe import Prune, Score
from paretron.surgery.selection import choose
from picocompensated import compensated, stream_errors, windows
from picoscores import prune_to, random_scores

RIDGE = 1e-9


def _moments(tokens: int = 60) -> tuple[torch.Tensor, torch.Tensor, Moments]:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(tokens, 20, generator=generator)
    y = torch.randn(tokens, 8, generator=generator)
    moments = Moments.zeros(20, 8)
    moments.add(a, y)
    return a, y, moments


def test_without_a_ridge_the_normal_equations_are_least_squares() -> None:
    a, y, moments = _moments()
    expected = torch.linalg.lstsq(a.double(), y.double()).solution.T
    torch.testing.assert_close(moments.solve(ridge=0.0), expected, rtol=1e-9, atol=1e-9)


def test_a_ridge_is_more_rows_of_least_squares() -> None:
    a, y, moments = _moments()
    weight = 0.3 * moments.inputs.dense().diagonal().mean()
    rows = torch.cat([a.double(), weight.sqrt() * torch.eye(20, dtype=torch.float64)])
    wanted = torch.cat([y.double(), torch.zeros(20, 8, dtype=torch.float64)])
    expected = torch.linalg.lstsq(rows, wanted).solution.T
    torch.testing.assert_close(moments.solve(ridge=0.3), expected, rtol=1e-9, atol=1e-9)


def test_nothing_missing_changes_nothing() -> None:
    moments = Moments.zeros(5, 3)
    moments.add(torch.randn(9, 5), torch.zeros(9, 3))
    assert not moments.solve(ridge=0.0).any()


@pytest.mark.parametrize("new", [{"ffn": 40}, {"q_per_kv": 1}, {"layers": 2}, {"hidden": 48}])
def test_every_layer_is_nearer_on_the_samples_it_was_fitted_to(
    pico: PicoMaker, new: dict[str, int]
) -> None:
    model = pico("llama")
    plain = stream_errors(model, ridge=None, count=6, length=40, **new)
    fitted = stream_errors(model, ridge=RIDGE, count=6, length=40, **new)
    assert all(b <= a + 1e-9 for a, b in zip(plain, fitted, strict=True))
    assert fitted[-1] < 0.9 * plain[-1]


@pytest.mark.parametrize("family", ["llama", "qwen2", "granite", "phi3", "starcoder2", "nemotron"])
def test_fewer_tokens_than_inputs_are_fitted_exactly(pico: PicoMaker, family: str) -> None:
    """Factors on residuals included: a target off by one would leave an error."""
    model = pico(family)
    assert max(stream_errors(model, ridge=None, count=1, length=20, ffn=40)) > 1e-3
    assert max(stream_errors(model, ridge=RIDGE, count=1, length=20, ffn=40)) < 1e-6


def test_the_layer_before_a_removed_block_stands_in_for_it(pico: PicoMaker) -> None:
    """What it should give is the stream behind the block, so few tokens are fitted exactly."""
    model = pico("llama")
    assert max(stream_errors(model, ridge=None, count=1, length=20, layers=2)) > 1e-2
    errors = stream_errors(model, ridge=RIDGE, count=1, length=20, layers=2)
    kept = choose(
        random_scores(Checkpoint.open(model)),
        sizes=sizes(Checkpoint.open(model).family, Checkpoint.open(model).config) | {"layers": 2},
        score=Score(),
    ).layers
    assert kept != (2, 3)  # something stands before the block
    assert max(errors) < 1e-6


def _caught(
    model: PreTrainedModel, name: str, run: Callable[[], object]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a module reads and gives in a run, [N, D]."""
    seen: list[torch.Tensor] = []

    def hook(_: object, inputs: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        seen.extend((inputs[0].flatten(0, 1).double(), out.flatten(0, 1).double()))

    handle = model.get_submodule(name).register_forward_hook(hook)
    run()
    handle.remove()
    return seen[0], seen[1]


def _ridged(a: torch.Tensor, y: torch.Tensor, ridge: float) -> torch.Tensor:
    inputs = a.T @ a
    inputs += ridge * inputs.diagonal().mean() * torch.eye(len(inputs), dtype=torch.float64)
    return torch.linalg.solve(inputs, a.T @ y).T


@torch.no_grad()
def _by_hand(teacher: PreTrainedModel, student: PreTrainedModel, ids: torch.Tensor) -> None:
    """Fit a two-layer student whose MLP is narrower, with whole passes of both models."""
    ridge = 0.01
    for i in range(2):
        layer = f"model.layers.{i}"
        attention = ("q_proj", "k_proj", "v_proj")
        for norm, readers, writer in (
            ("input_layernorm", [f"self_attn.{n}" for n in attention], "self_attn.o_proj"),
            ("post_attention_layernorm", ["mlp.gate_proj", "mlp.up_proj"], "mlp.down_proj"),
        ):
            _fit_readers(teacher, student, ids, f"{layer}.{norm}", layer, readers, ridge)
            after = f"{layer}.post_attention_layernorm" if writer.startswith("self") else layer
            wanted = _stream(teacher, after, ids)
            missing = wanted - _stream(student, after, ids)
            read, _ = _caught(student, f"{layer}.{writer}", lambda: student(ids))
            student.get_submodule(f"{layer}.{writer}").weight += _ridged(read, missing, ridge)
    _fit_readers(teacher, student, ids, "model.norm", "", ["lm_head"], ridge)


def _stream(model: PreTrainedModel, name: str, ids: torch.Tensor) -> torch.Tensor:
    read, given = _caught(model, name, lambda: model(ids))
    return read if name.endswith("norm") else given


def _fit_readers(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    ids: torch.Tensor,
    norm: str,
    layer: str,
    readers: list[str],
    ridge: float,
) -> None:
    _, given = _caught(teacher, norm, lambda: teacher(ids))
    _, found = _caught(student, norm, lambda: student(ids))
    more = _ridged(found, given - found, ridge)
    for reader in readers:
        weight = student.get_submodule(f"{layer}.{reader}".lstrip(".")).weight
        weight += weight @ more.float()


def test_sequential_refit_is_what_it_is_by_hand(pico: PicoMaker) -> None:
    model = pico("llama", num_hidden_layers=2)
    out = model.parent / "out"
    compensated(model, out, new={"ffn": 40}, prune=Prune(merge_heads=False), count=8)
    prune_to(model, model.parent / "plain", ffn=40)
    teacher, student = load_model(model), load_model(model.parent / "plain")
    _by_hand(teacher, student, torch.stack(windows(8)[:7]))  # the eighth is held back
    found = load_model(out).state_dict()
    for name, expected in student.state_dict().items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5, msg=name)


def test_the_same_bytes_twice(pico: PicoMaker) -> None:
    model = pico("qwen3", dtype="bfloat16")
    digests = []
    for name in ("a", "b"):
        out = model.parent / name
        compensated(model, out, new={"hidden": 48, "ffn": 40, "q_per_kv": 1, "layers": 3}, count=4)
        digests.append(hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest())
    assert digests[0] == digests[1]
