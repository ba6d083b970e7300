"""The real vLLM, on the CPU, runs what is written in integers as its numbers say."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from paretron.artifacts.models import load_model
from paretron_exporters.hf import EXPORTER
from vllmserver import answer

PicoMaker = Callable[..., Path]
RunExport = Callable[..., Any]

STEPS = 8
GENERATOR = torch.Generator().manual_seed(5)
PROMPTS = torch.randint(3, 300, (4, 100), generator=GENERATOR).tolist()
DENSE = ("llama", "mistral", "qwen3")
EXPERTS = {"mixtral": {"intermediate_size": 64}, "qwen3_moe": {"moe_intermediate_size": 64}}
# Where two logits of a random model are within rounding of one another, either may win.
AGREEMENT = 0.97


def decoded(source: Path, folder: Path) -> torch.nn.Module:
    """The source with the weights that were written, its linears reading rounded activations."""
    model, after = load_model(source), load_file(folder / "model.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name + "_scale" in after:
                parameter.copy_(after[name].float() * after[name + "_scale"])
                linear = model.get_submodule(name.removesuffix(".weight"))
                linear.register_forward_pre_hook(lambda module, inputs: (by_token(inputs[0]),))
    return model


def by_token(x: torch.Tensor) -> torch.Tensor:
    """Each token's channels as one of 255 integers times a scale."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round().clamp(-127, 127) * scale


def likeliest(model: torch.nn.Module) -> list[list[int]]:
    """The token that each position of each prompt makes likeliest, but for the last."""
    with torch.inference_mode():
        found: list[list[int]] = model(torch.tensor(PROMPTS)).logits[:, :-1].argmax(-1).tolist()
    return found


def agreement(expected: list[list[int]], found: list[list[int]]) -> float:
    return float((torch.tensor(expected) == torch.tensor(found)).float().mean())


def test_vllm_runs_what_was_written_in_integers(
    pico: PicoMaker, run_export: RunExport, tmp_path: Path
) -> None:
    python = os.environ.get("PARETRON_VLLM_PYTHON")
    if not python:
        pytest.skip("PARETRON_VLLM_PYTHON names no interpreter that has vLLM")
    out = {family: tmp_path / f"{family}-int8" for family in (*DENSE, *EXPERTS)}
    sources = {f: pico(f, name=f, seed=3, **EXPERTS.get(f, {})) for f in out}
    for family, folder in out.items():
        run_export(EXPORTER, sources[family], folder, quantize="int8")
    said = answer(
        python,
        Path(__file__).with_name("vllm_quantized_worker.py"),
        {
            "models": [str(out[f]) for f in DENSE],
            "experts": [str(out[f]) for f in EXPERTS],
            "prompts": PROMPTS,
            "steps": STEPS,
        },
        folder=tmp_path,
    )
    for family in DENSE:
        found = said[str(out[family])]
        assert agreement(likeliest(decoded(sources[family], out[family])), found["top"]) > AGREEMENT
        assert agreement(likeliest(load_model(sources[family])), found["top"]) > 0.9
        assert all(len(tokens) == STEPS for tokens in found["greedy"])
    for family in EXPERTS:
        check_experts(said[str(out[family])], family, out[family])


def check_experts(found: dict[str, Any], family: str, folder: Path) -> None:
    """Experts ran, or at least every scale went where it belongs: gate and up joined, and down."""
    if "top" in found:
        assert all(len(tokens) == STEPS for tokens in found["greedy"])
        return
    after = load_file(folder / "model.safetensors")
    gate, up, down = ("w1", "w3", "w2") if family == "mixtral" else (
        "gate_proj", "up_proj", "down_proj")  # fmt: skip
    prefixes = sorted({n.split("experts.")[0] for n in after if ".experts." in n})
    assert len(found["scales"]) == 2 * len(prefixes)
    joined = {
        "w13": [f"{e}.{part}" for e in range(4) for part in (gate, up)],
        "w2": [f"{e}.{down}" for e in range(4)],
    }
    for name, values in found["scales"].items():
        layer = name.split("layers.")[1].split(".")[0]
        (prefix,) = (p for p in prefixes if f"layers.{layer}." in p)
        parts = joined["w13" if "w13" in name else "w2"]
        expected = torch.cat([after[f"{prefix}experts.{p}.weight_scale"].flatten() for p in parts])
        assert torch.allclose(torch.tensor(values), expected)
