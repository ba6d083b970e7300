"""Checkpoints for TensorRT-LLM's engine builder, made and taken apart by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from paretron.artifacts.manifest import Provenance
from paretron.artifacts.reader import Checkpoint
from paretron.data.texts import Texts
from paretron.evaluate.parity import ParityReport
from paretron.families import FAMILIES, sizes
from paretron.recipe import Export
from paretron_exporters.trtllm_engine import EXPORTER

Tensors = dict[str, torch.Tensor]

# By hand, apart from the exporter's own table: HF module of a layer -> module of the format.
GATED = {
    "self_attn.o_proj": "attention.dense", "mlp.gate_proj": "mlp.fc", "mlp.up_proj": "mlp.gate",
    "mlp.down_proj": "mlp.proj", "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_layernorm", "self_attn.q_norm": "attention.q_layernorm",
    "self_attn.k_norm": "attention.k_layernorm",
}  # fmt: skip
PLAIN_MLP = {**GATED, "mlp.up_proj": "mlp.fc"}
del PLAIN_MLP["mlp.gate_proj"]
BY_ROWS = ("mlp.fc.", "mlp.gate.")
BY_COLUMNS = ("attention.dense.weight", "mlp.proj.weight")


def export_engine(
    source: Path,
    out: Path,
    *,
    texts: Texts | None = None,
    notes: list[str] | None = None,
    **section: Any,
) -> ParityReport:
    """`export_engine(source, out, tensor_parallel=2)`; `notes` gets what it says."""

    def on_event(kind: str, fields: Mapping[str, object]) -> None:
        if kind == "note" and notes is not None:
            notes.append(str(fields["message"]))

    return EXPORTER.export(
        source,
        export=Export.model_validate({"to": EXPORTER.name} | section),
        out=out,
        provenance=Provenance(kind="export", parents={"model": "0" * 64}, stamp="TEST"),
        texts=texts,
        on_event=on_event,
    )


def random_texts(folder: Path) -> Texts:
    """Windows of random tokens for a pico vocabulary."""
    folder.mkdir()
    ids = np.random.default_rng(0).integers(3, 300, 16 * 32).astype("<u2")
    ids.tofile(folder / "tokens-00000.bin")
    np.array([0], dtype="<u8").tofile(folder / "documents.bin")
    header = {
        "dtype": "uint16", "num_tokens": len(ids), "shard_tokens": len(ids), "num_documents": 1,
        "eos_token_id": 1,
    }  # fmt: skip
    (folder / "tokens.json").write_text(json.dumps(header))
    return Texts(folder, 32, 8, folder, 32, 0)


def tensors_of(source: Path) -> Tensors:
    """Every tensor of a checkpoint by name."""
    checkpoint = Checkpoint.open(source)
    return {name: checkpoint.read(name) for name in checkpoint.entries}


def ranks_of(folder: Path, tp: int, pp: int) -> list[list[Tensors]]:
    """The files of every stage, by the format's own rule for their numbers."""
    files = [[folder / f"rank{s * tp + r}.safetensors" for r in range(tp)] for s in range(pp)]
    return [[load_file(file) for file in stage] for stage in files]


def joined(stages: list[list[Tensors]], config: Mapping[str, Any]) -> Tensors:
    """The HF tensors, put together from the ranks with numpy-like steps alone."""
    family = FAMILIES[config["model_type"]]
    size = sizes(family, config)
    tp, heads, width = len(stages[0]), size["kv_heads"] * size["q_per_kv"], size["head_dim"]
    own_keys = max(1, size["kv_heads"] // tp)
    copies = max(1, tp // size["kv_heads"])
    names = PLAIN_MLP if family.model_type == "nemotron" else GATED
    vocab = size["vocab"]
    out = {
        "model.embed_tokens.weight": torch.cat(
            [t["transformer.vocab_embedding.weight"] for t in stages[0]]
        )[:vocab],
        "lm_head.weight": torch.cat([t["lm_head.weight"] for t in stages[-1]])[:vocab],
    }
    for leaf in ("weight", "bias"):
        if f"transformer.ln_f.{leaf}" in stages[-1][0]:
            out[f"model.norm.{leaf}"] = stages[-1][0][f"transformer.ln_f.{leaf}"]
    layer = 0
    for files in stages:
        local = 0
        while f"transformer.layers.{local}.attention.qkv.weight" in files[0]:
            theirs, ours = f"transformer.layers.{local}.", f"model.layers.{layer}."
            for leaf in ("weight", "bias"):
                if f"{theirs}attention.qkv.{leaf}" in files[0]:
                    split = [heads // tp * width, own_keys * width, own_keys * width]
                    parts = [t[f"{theirs}attention.qkv.{leaf}"].split(split) for t in files]
                    for k, letter in enumerate("qkv"):
                        of_ranks = [p[k] for p in parts][:: 1 if letter == "q" else copies]
                        out[f"{ours}self_attn.{letter}_proj.{leaf}"] = torch.cat(of_ranks)
                for hf_name, name in names.items():
                    full = f"{theirs}{name}.{leaf}"
                    if full not in files[0]:
                        continue
                    values = [t[full] for t in files]
                    if f"{name}.{leaf}".startswith(BY_ROWS):
                        found = torch.cat(values)
                    elif f"{name}.{leaf}" in BY_COLUMNS:
                        found = torch.cat(values, dim=1)
                    else:
                        assert all(torch.equal(v, values[0]) for v in values)
                        found = values[0]
                    out[f"{ours}{hf_name}.{leaf}"] = found
            layer, local = layer + 1, local + 1
    assert layer == size["layers"]
    return out


def assert_is_source(found: Tensors, source: Path) -> None:
    """Every tensor of the source, and no other; Nemotron's norms are stored with their 1."""
    checkpoint = Checkpoint.open(source)
    if checkpoint.config["tie_word_embeddings"]:
        assert torch.equal(found.pop("lm_head.weight"), found["model.embed_tokens.weight"])
    assert found.keys() == checkpoint.entries.keys()
    for name, values in found.items():
        expected = checkpoint.read(name)
        if checkpoint.family.model_type == "nemotron" and "norm.weight" in name:
            expected = expected + 1
        assert torch.equal(values, expected), name
