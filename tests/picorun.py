"""A whole recipe in seconds: a pico teacher, a little text, two students."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pico import make_pico

WORDS = "the of a to in is that it was for on are as with his they at be this from have or by one"

RECIPE: dict[str, Any] = {
    "schema": 1,
    "teacher": {"model": "./teacher"},
    "data": {
        "calibration": {"path": "calibration.jsonl", "samples": 8, "seq_len": 32},
        "train": {"path": "train.txt", "seq_len": 32},
        "validation": {"path": "validation.txt", "seq_len": 32, "tokens": 512},
    },
    "correct": {
        "tokens": 512, "lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 1, "global_batch": 4,
        "micro_batch": 4, "dtype": "float32", "checkpoint_every": 2, "eval_every": 2,
    },
    "score": {"depth": {"samples": 4}},
    "students": {"width": {"hidden": 48, "ffn": 64}, "depth": {"layers": 2}},
    "distill": {
        "tokens": 768, "lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 1, "global_batch": 4,
        "micro_batch": 2, "dtype": "float32", "checkpoint_every": 2, "eval_every": 2,
    },
    "export": [{"to": "hf"}, {"to": "onnx"}],
    "profile": {
        "engines": [{"name": "ortgenai"}], "batches": [1, 2], "lengths": [[8, 4]], "repeats": 3,
    },
}  # fmt: skip


def write_pico_recipe(folder: Path, *, family: str = "llama", **changes: Any) -> Path:
    """Write a teacher, its texts and a recipe into `folder`; `changes` replace whole sections."""
    generator = random.Random(0)
    for name, lines in (("calibration.jsonl", 40), ("train.txt", 120), ("validation.txt", 40)):
        text = [" ".join(generator.choices(WORDS.split(), k=20)) for _ in range(lines)]
        if name.endswith(".jsonl"):
            text = [json.dumps({"text": line}) for line in text]
        (folder / name).write_text("\n".join(text) + "\n")
    teach(make_pico(folder / "teacher", family), (folder / "train.txt").read_text())
    path = folder / "recipe.yaml"
    recipe = {k: v for k, v in (RECIPE | changes).items() if v is not None}
    path.write_text(json.dumps(recipe, indent=1))  # JSON is YAML
    return path


def teach(teacher: Path, text: str, *, steps: int = 60, seq_len: int = 32) -> None:
    """Train a pico model on a text until it knows more than nothing, and save it in place."""
    model = AutoModelForCausalLM.from_pretrained(teacher)
    ids = AutoTokenizer.from_pretrained(teacher)(text, return_tensors="pt").input_ids[0]
    windows = ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = windows[torch.randint(len(windows), (8,), generator=generator)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(teacher)


def paretron(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "paretron", *map(str, arguments)],
        cwd=cwd, capture_output=True, text=True, check=False,
    )  # fmt: skip


def hashes(
    run: Path, *, of: tuple[str, ...] = ("width.distill", "depth.distill")
) -> dict[str, str]:
    """The sha256 of every weight and config of a run's students."""
    found = {}
    for stage in of:
        for path in sorted((run / "stages" / stage).iterdir()):
            if path.suffix in (".safetensors", ".json") and path.name not in (
                "manifest.json", "metrics.json",
            ):  # fmt: skip
                found[f"{stage}/{path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def events(run: Path) -> list[dict[str, Any]]:
    """Every event that a run logged."""
    lines = (run / "events.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be cut
