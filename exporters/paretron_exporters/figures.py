"""The figures on an export's card: the shape of the model, and how equal the export is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paretron.evaluate.parity import ParityReport
from paretron.families import family_of, kv_bytes_per_token, parameter_counts, sizes

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

_NAMES = {"ffn": "MLP size", "experts": "experts a layer", "moe_ffn": "MLP size of an expert"}


def about_model(config: Mapping[str, Any]) -> str:
    """One line that says which model this is, e.g. for a title."""
    family = family_of(config)
    return f"{family.architecture}, {parameter_counts(family, config).total:,} parameters"


def figures(config: Mapping[str, Any], report: ParityReport, *, dtype: str) -> dict[str, str]:
    """Names and values in the order a reader wants them; `dtype` is that of weights and cache."""
    family = family_of(config)
    size = sizes(family, config)
    counts = parameter_counts(family, config)
    cache = kv_bytes_per_token(family, config, bytes_per_value=_BYTES[dtype])
    heads = size["kv_heads"] * size["q_per_kv"]
    shape = {
        "parameters": f"{counts.total:,}",
        "of them in embeddings": f"{counts.embedding:,}",
        "dtype": dtype,
        "layers": str(size["layers"]),
        "hidden size": str(size["hidden"]),
        **{_NAMES[axis]: str(size[axis]) for axis in _NAMES if axis in size},
        "attention": f"{heads} heads, {size['kv_heads']} key-value heads of {size['head_dim']}",
        "vocabulary": f"{size['vocab']:,}",
        "key-value cache": f"{cache:,} bytes a token",
    }
    measured = {
        f"{check.level} {check.about}": ", ".join(f"{k} {v:.3g}" for k, v in check.measured.items())
        for check in report.checks
    }
    return shape | measured
