"""The eight published shapes: exact parameter counts, and the very tensors transformers makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from paretron.families import expected_tensors, family_of, kv_bytes_per_token, parameter_counts


@dataclass(frozen=True)
class Shape:
    """A published model: what its config says and what its authors counted."""

    model_type: str
    vocab: int
    hidden: int
    layers: int
    heads: int
    ffn: int
    total: int
    non_embedding: int
    published: tuple[float, float]  # as printed, in billions

    @property
    def config(self) -> dict[str, Any]:
        return {
            "model_type": self.model_type,
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": self.ffn,
            "tie_word_embeddings": False,
        }


SHAPES = {
    "Nemotron-4-15B": Shape(
        "nemotron", 256000, 6144, 32, 48, 24576, 15628775424, 12483047424, (15.6, 12.5)
    ),
    "Minitron-8B": Shape(
        "nemotron", 256000, 4096, 32, 48, 16384, 8271699968, 6174547968, (8.27, 6.2)
    ),
    "Minitron-4B": Shape(
        "nemotron", 256000, 3072, 32, 24, 9216, 4190509056, 2617645056, (4.19, 2.6)
    ),
    "Llama-3.1-8B": Shape(
        "llama", 128256, 4096, 32, 32, 14336, 8030261248, 6979588096, (8.03, 7.0)
    ),
    "Llama-3.1-Minitron-4B-Width": Shape(
        "llama", 128256, 3072, 32, 32, 9216, 4512746496, 3724741632, (4.51, 3.7)
    ),
    "Llama-3.1-Minitron-4B-Depth": Shape(
        "llama", 128256, 4096, 16, 32, 14336, 4540469248, 3489796096, (4.54, 3.5)
    ),
    "Mistral-NeMo-12B": Shape(
        "mistral", 131072, 5120, 40, 32, 14336, 12247782400, 10905605120, (12.2, 10.9)
    ),
    "MN-Minitron-8B": Shape(
        "mistral", 131072, 4096, 40, 32, 11520, 8414105600, 7340363776, (8.41, 7.3)
    ),
}


def independent_count(shape: Shape) -> tuple[int, int]:
    """The same counts by plain arithmetic, without the table."""
    attention = 2 * shape.hidden * shape.heads * 128 + 2 * shape.hidden * 8 * 128
    matrices, norm = (2, 2 * shape.hidden) if shape.model_type == "nemotron" else (3, shape.hidden)
    layer = attention + matrices * shape.hidden * shape.ffn + 2 * norm
    body = shape.layers * layer + norm
    return body + 2 * shape.vocab * shape.hidden, body


@pytest.mark.parametrize("name", SHAPES)
def test_published_counts_are_exact(name: str) -> None:
    shape = SHAPES[name]
    counts = parameter_counts(family_of(shape.config), shape.config)
    assert (counts.total, counts.non_embedding) == independent_count(shape)
    assert (counts.total, counts.non_embedding) == (shape.total, shape.non_embedding)
    for exact, printed in zip((counts.total, counts.non_embedding), shape.published, strict=True):
        digits = len(str(printed).split(".")[1])
        assert abs(exact / 1e9 - printed) <= 0.5001 * 10**-digits


@pytest.mark.parametrize("name", SHAPES)
def test_the_table_names_what_transformers_makes(name: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = SHAPES[name].config | {"num_hidden_layers": 2}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    made = {n: tuple(p.shape) for n, p in model.state_dict().items()}
    assert expected_tensors(family_of(config), config) == made


def test_counts_and_tensors_agree_at_full_depth() -> None:
    from math import prod

    for shape in SHAPES.values():
        family = family_of(shape.config)
        listed = sum(prod(s) for s in expected_tensors(family, shape.config).values())
        assert listed == parameter_counts(family, shape.config).total


def test_kv_cache_bytes() -> None:
    """A width student keeps its teacher's cache, a depth student of half the layers halves it."""
    llama, width, depth = (
        kv_bytes_per_token(family_of(SHAPES[n].config), SHAPES[n].config)
        for n in ("Llama-3.1-8B", "Llama-3.1-Minitron-4B-Width", "Llama-3.1-Minitron-4B-Depth")
    )
    assert llama == width == 2 * 32 * 8 * 128 * 2
    assert depth == llama // 2


def test_tensors_come_in_execution_order() -> None:
    config = SHAPES["Llama-3.1-8B"].config | {"num_hidden_layers": 3}
    names = list(expected_tensors(family_of(config), config))
    assert names[0] == "model.embed_tokens.weight"
    assert names[-2:] == ["model.norm.weight", "lm_head.weight"]
    layers = [int(n.split(".")[2]) for n in names if ".layers." in n]
    assert layers == sorted(layers)
    assert len(layers) == 3 * 9


def test_tied_embeddings_count_once() -> None:
    config = SHAPES["Llama-3.1-8B"].config | {"tie_word_embeddings": True}
    counts = parameter_counts(family_of(config), config)
    assert counts.embedding == 128256 * 4096
    assert counts.total == 8030261248 - 128256 * 4096
