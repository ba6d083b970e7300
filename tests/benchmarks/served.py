"""Students served by vLLM's OpenAI server on the CPU, against transformers: JSON lines.

PARETRON_VLLM_PYTHON=PYTHON PYTHONPATH=tests python -m benchmarks.served

Pico models in bf16 are exported to `hf`, plain and INT8 (W8A8). A plain one runs in float32 and
must give the greedy tokens of transformers; of an INT8 one it is said how many are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paretron.artifacts.manifest import Provenance
from paretron.plugins import EXPORTERS, find_plugin
from paretron.recipe import Export
from paretron_exporters.transformers_engine import TransformersEngine
from pico import make_pico
from vllmserver import greedy, served

STEPS = 20
PROMPTS = [[5, 6, 7, 8], [300, 17, 4, 90, 23, 11, 250], list(range(40, 90))]
FAMILIES = {"llama": 0, "mistral": 0, "qwen3": 0, "mixtral": 3}  # and the seed of its weights


def main() -> None:
    """Serve every family in both forms."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--forms", nargs="*", default=["plain", "int8"])
    asked = parser.parse_args()
    python = os.environ.get("PARETRON_VLLM_PYTHON")
    if not python:
        parser.exit(0, "PARETRON_VLLM_PYTHON names no interpreter: nothing measured\n")
    torch.set_num_threads(1)
    for family in asked.families:
        for form in asked.forms:
            with tempfile.TemporaryDirectory() as place:
                print(json.dumps(compared(family, form, Path(place), python)), flush=True)


def compared(family: str, form: str, place: Path, python: str) -> dict[str, Any]:
    """One student: exported, served, and how far the server's tokens are those of transformers."""
    source = make_pico(place / "source", family, seed=FAMILIES[family], dtype="bfloat16")
    exported(source, place / "export", quantize=None if form == "plain" else form)
    expected, close = by_transformers(source)
    line: dict[str, Any] = {"family": family, "form": form}
    try:
        with served(python, place / "export", dtype="float32", home=place) as address:
            found = greedy(address, PROMPTS, steps=STEPS)
    except AssertionError as error:
        return line | {"served": False, "why": str(error)[-400:]}
    same = [a == b for x, y in zip(expected, found, strict=True) for a, b in zip(x, y, strict=True)]
    return line | {"served": True, "equal": expected == found, "same": sum(same), "of": len(same),
                   "smallest_lead": close}  # fmt: skip


def exported(source: Path, out: Path, *, quantize: str | None) -> None:
    """Write the checkpoint that is served."""
    find_plugin(EXPORTERS, "hf", where="to").export(
        source,
        export=Export(to="hf", quantize=quantize),
        texts=None,
        out=out,
        provenance=Provenance(kind="export"),
        on_event=lambda kind, fields: None,
    )


def by_transformers(folder: Path) -> tuple[list[list[int]], float]:
    """Greedy tokens in float32, and the smallest lead that a chosen token had over the second."""
    engine, found, lead = TransformersEngine(folder), [], float("inf")
    for prompt in PROMPTS:
        session, tokens = engine.start(), []
        logits = session.feed(prompt)[-1]
        for _ in range(STEPS):
            second, first = np.sort(logits)[-2:]
            lead = min(lead, float(first - second))
            tokens.append(int(logits.argmax()))
            logits = session.feed(tokens[-1:])[-1]
        found.append(tokens)
    return found, lead


if __name__ == "__main__":
    main()
