"""transformers 4.57, which TensorRT-LLM's containers have, reads our configs as 5 does."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, PretrainedConfig

from paretron.artifacts.config import servable_config
from paretron.families import FAMILIES
from pico import MOE_FAMILIES, PICO_FAMILIES, pico_model
from published import PUBLISHED

TREE = Path(__file__).parents[2]
DEFAULT = ".venv-transformers4/bin/python"
# Families that transformers 4.57 has no class for.
ABSENT: frozenset[str] = frozenset()
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
LISTS = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
# Rotary embeddings as published models have them, in either spelling.
ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-base": ("llama", {"rope_theta": 123456.0}),
    "llama-new": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 7e5}}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-llama3-old": ("llama", {"rope_theta": 500000.0, "rope_scaling": {
        k: v for k, v in LLAMA3.items() if k != "rope_theta"}}),
    "llama-linear": ("llama", {"rope_theta": 1e4, "rope_scaling": {
        "type": "linear", "factor": 4.0}}),
    "llama-dynamic": ("llama", {"rope_theta": 1e4, "rope_scaling": {
        "type": "dynamic", "factor": 2.0}}),
    "qwen2-yarn": ("qwen2", {"rope_theta": 1e6, "rope_scaling": {
        "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}}),
    "qwen3-yarn": ("qwen3", {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 5e6, "factor": 2.0,
        "original_max_position_embeddings": 256}}),
    "nemotron-partial": ("nemotron", {"partial_rotary_factor": 0.25, "rope_theta": 2e4}),
    "gemma3-linear": ("gemma3_text", {"rope_local_base_freq": 777.0, "rope_theta": 5e5,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "phi3-longrope": ("phi3", {"hidden_size": 128, "rope_scaling": {"type": "longrope", **LISTS},
        "original_max_position_embeddings": 256}),
    "tied-bf16": ("llama", {"tie_word_embeddings": True}),
}  # fmt: skip


def pico_config(family: str, **more: Any) -> dict[str, Any]:
    """The config.json of a pico model, as its library writes it."""
    found: dict[str, Any] = pico_model(family, num_hidden_layers=4).config.to_dict()
    for key in ("rope_parameters", "rope_theta", "rope_scaling", "rope_local_base_freq"):
        if more.keys() & {"rope_parameters", "rope_theta", "rope_scaling"}:
            found.pop(key, None)
    return found | more


def written_configs() -> dict[str, dict[str, Any]]:
    """Every family, every rotary embedding, and the published shapes, as an export writes them."""
    configs = {family: pico_config(family) for family in (*PICO_FAMILIES, *MOE_FAMILIES)}
    configs |= {name: pico_config(family, **more) for name, (family, more) in ROPES.items()}
    configs |= {shape.name: shape.config | {"rope_theta": 5e5} for shape in PUBLISHED}
    # Mistral's name, because Llama's class refuses the shape.
    relabelled = {"hidden_size": 80, "num_attention_heads": 6, "num_key_value_heads": 2}
    configs["relabelled"] = pico_config("mistral") | relabelled | {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_theta": 2e6,
        "rope_parameters": None,
    }  # fmt: skip
    out = {}
    for number, (name, config) in enumerate(configs.items()):
        dtype = ("bfloat16", "float16", "float32")[number % 3]
        out[name] = json.loads(json.dumps(servable_config(config, dtype=dtype)))
    return out


def as_five_reads(config: PretrainedConfig) -> dict[str, Any]:
    """What transformers 5 makes of a config, in the words of transformers 4."""
    rope: dict[str, Any] = dict(config.rope_parameters)
    local = rope.get("sliding_attention", {}).get("rope_theta")
    rope = dict(rope.get("full_attention", rope))
    theta, partial = rope.pop("rope_theta"), rope.pop("partial_rotary_factor", None)
    long_after = getattr(config, "original_max_position_embeddings", None)
    if rope["rope_type"] == "longrope":  # 4 has it beside the lists, 5 reads it from there
        assert rope.pop("original_max_position_embeddings") == long_after
    return {
        "class": type(config).__name__,
        "rope_theta": theta,
        "local_rope_theta": local,
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "long_after": long_after,
        "partial_rotary_factor": partial,
        "head_dim": config.head_dim,
        "num_key_value_heads": config.num_key_value_heads,
        "hidden_size": config.hidden_size,
        "layer_types": getattr(config, "layer_types", None),
        "tie_word_embeddings": config.tie_word_embeddings,
        "dtype": str(config.dtype).removeprefix("torch."),
    }


@pytest.fixture(scope="module")
def read_by_both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    """Every config as transformers 4 reads it (one process for all), and as 5 does."""
    python = Path(os.environ.get("PARETRON_TRANSFORMERS4_PYTHON", TREE / DEFAULT))
    if not python.is_file():
        pytest.skip("PARETRON_TRANSFORMERS4_PYTHON names no interpreter with transformers 4")
    work = tmp_path_factory.mktemp("configs")
    folders = {}
    for number, (name, config) in enumerate(written_configs().items()):
        folder = work / str(number)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        folders[name] = str(folder)
    (work / "request.json").write_text(json.dumps(folders))
    worker = Path(__file__).with_name("transformers4_worker.py")
    done = subprocess.run(
        [python, "-I", worker, work / "request.json", work / "answer.json"],
        env={"HF_HUB_OFFLINE": "1", "HOME": str(work), "PATH": os.environ["PATH"]},
        cwd=work, timeout=120, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    four = json.loads((work / "answer.json").read_text())
    five = {n: as_five_reads(AutoConfig.from_pretrained(f)) for n, f in folders.items()}
    return {name: (four[name], five[name]) for name in folders}


def test_every_config_means_the_same_there(read_by_both: dict[str, tuple[Any, Any]]) -> None:
    assert len(read_by_both) == len(written_configs()) > 30
    compared = {n: pair for n, pair in read_by_both.items() if "absent" not in pair[0]}
    assert {n: p for n, p in compared.items() if comparable(p[0]) != comparable(p[1])} == {}


def test_what_is_not_there_is_known(read_by_both: dict[str, tuple[Any, Any]]) -> None:
    assert {four["absent"] for four, _ in read_by_both.values() if "absent" in four} == ABSENT
    named = {config["model_type"] for config in written_configs().values()}
    assert named == {family.model_type for family in FAMILIES.values()}


def comparable(read: dict[str, Any]) -> dict[str, Any]:
    """A reading in one spelling: `type` is an older name of `rope_type`."""
    scaling = read["rope_scaling"]
    if scaling is None:
        return read
    kinds = {scaling[key] for key in ("type", "rope_type") if key in scaling}
    rest = {k: v for k, v in scaling.items() if k not in ("type", "rope_type")}
    return read | {"rope_scaling": ({*kinds}, rest)}


def test_a_config_in_the_new_spelling_alone_would_be_misread(tmp_path: Path) -> None:
    """Why both are written: without the older keys transformers 4 takes its own base."""
    python = Path(os.environ.get("PARETRON_TRANSFORMERS4_PYTHON", TREE / DEFAULT))
    if not python.is_file():
        pytest.skip("PARETRON_TRANSFORMERS4_PYTHON names no interpreter with transformers 4")
    config = servable_config(pico_config("llama", rope_parameters=LLAMA3), dtype="bfloat16")
    for key in ("rope_theta", "rope_scaling"):
        del config[key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "request.json").write_text(json.dumps({"new": str(tmp_path)}))
    worker = Path(__file__).with_name("transformers4_worker.py")
    subprocess.run(
        [python, "-I", worker, tmp_path / "request.json", tmp_path / "answer.json"],
        env={"HF_HUB_OFFLINE": "1", "HOME": str(tmp_path), "PATH": os.environ["PATH"]},
        cwd=tmp_path, timeout=120, check=True, capture_output=True,
    )  # fmt: skip
    assert json.loads((tmp_path / "answer.json").read_text())["new"]["rope_theta"] == 10000.0
