"""An operator table's predictions against shapes that it has not seen: JSON lines.

PYTHONPATH=tests python -m benchmarks.operator_table --engine ortgenai [--python PYTHON]

A table of two hidden and two MLP sizes is measured; then models between them, of other depths, are
run as a whole. Prediction and measurement are of one batch of requests, in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from paretron.plugins import ENGINES, find_plugin
from paretron.recipe import load_recipe
from paretron.run.tabling import Tabling, measure_table
from paretron.search.space import Shapes
from paretron.search.table import predicted_ms
from paretron_profiling.engines.engine import Limits
from paretron_profiling.prompts import random_prompts
from pico import make_pico

TEACHER: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8,
    "num_key_value_heads": 4, "num_hidden_layers": 6, "vocab_size": 2048,
}  # fmt: skip
RECIPE = """\
schema: 1
teacher: {model: ./model}
data:
  calibration: {corpus: stdlib, part: calibration, seq_len: 64}
  train: {corpus: stdlib, part: train, seq_len: 64}
  validation: {corpus: stdlib, part: validation, seq_len: 64, tokens: 640}
students:
  best:
    search:
      space: {hidden: [128, 256], ffn: [256, 512], layers: [2, 4, 6]}
      budget: {speed: {engine: ENGINE, table: t.json, batch: 2, lengths: [64, 32], ms: 1000,
                       repeats: REPEATS}}
      rounds: []
distill: {tokens: 1.0e5, global_batch: 8}
"""
UNSEEN = ((192, 384, 4), (160, 320, 6), (224, 448, 2), (256, 512, 6))  # hidden, MLP, layers


def main() -> None:
    """Measure the table, then every unseen shape."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", default="ortgenai")
    parser.add_argument("--python", type=Path)
    parser.add_argument("--repeats", type=int, default=9)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        make_pico(Path(place) / "model", **TEACHER)
        recipe = Path(place) / "recipe.yaml"
        text = RECIPE.replace("ENGINE", asked.engine).replace("REPEATS", str(asked.repeats))
        recipe.write_text(text)
        tabling = Tabling.of(load_recipe(recipe), student=None, python=asked.python, offline=True)
        journal = Path(place) / "journal"
        table = measure_table(tabling, journal=journal, on_event=lambda kind, fields: None)
        for shape in UNSEEN:
            size = dict(zip(("hidden", "ffn", "layers"), shape, strict=True))
            full = {**tabling.points()[0], **size}
            one = Shapes({axis: np.array([n]) for axis, n in full.items()})
            predicted = float(predicted_ms(table, one, tabling.speed)[0])
            measured = whole(tabling, full, asked.repeats)
            middle = median(measured)
            line = {
                "engine": table.engine, "device": table.device, **size,
                "load_1m": os.getloadavg()[0],
                "predicted_ms": predicted, "measured_ms": middle,
                "spread": (max(measured) - min(measured)) / middle, "error": predicted / middle - 1,
            }  # fmt: skip
            print(json.dumps(line), flush=True)


def whole(tabling: Tabling, size: dict[str, int], repeats: int) -> list[float]:
    """Milliseconds of each batch through the engine, after one that warms up."""
    engine: Any = find_plugin(ENGINES, tabling.settings.name, where="--engine")
    speed = tabling.speed
    tokens = sum(speed.lengths)
    layers = size["layers"]
    with tabling.made({a: n for a, n in size.items() if a != "layers"}, layers) as model:
        kv_bytes = speed.batch * tokens * model.facts.kv_bytes_per_token
        limits = Limits(batch=speed.batch, context_len=tokens, kv_bytes=kv_bytes)
        folder = model.folders[engine.wants]
        with engine.open(folder, settings=tabling.settings, limits=limits) as session:
            found = []
            for number in range(-1, repeats):
                prompts = random_prompts(
                    batch=speed.batch, input_len=speed.lengths[0], seed=str(number),
                    vocab_size=model.facts.vocab_size, avoid=model.facts.special_ids,
                )  # fmt: skip
                found.append(1e3 * session.generate(prompts, speed.lengths[1]).total_s)
    return found[1:]


if __name__ == "__main__":
    main()
