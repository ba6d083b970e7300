"""Our quantised writer against a copy: time and peak memory of each, as JSON.

python tests/benchmarks/quantizing.py --folder /data/bench --repeats 3

Builds a Llama of 0.5 billion random bf16 weights (1 GB), or takes the one that is in the folder
already. Each task runs in a process of its own, `copy` (read and written in blocks of 8 MB, hashed
like an export), `int8` and `fp8_dynamic` (written and hashed; the gates that follow are not in it),
all synced, in turns. The source is in the page cache. Peaks are what is held besides mapped files
(RssAnon), sampled every 5 ms, over what the imports take.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from paretron.artifacts.companions import write_companions
from paretron.artifacts.config import servable_config
from paretron.artifacts.reader import Checkpoint
from paretron.artifacts.writer import TensorWriter
from paretron.families import expected_tensors, family_of
from paretron_exporters.compressed import write_compressed
from paretron_exporters.quantized_forms import FORMS, stored_layout

CONFIG: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 2048,
    "intermediate_size": 8192, "num_hidden_layers": 6, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32000, "hidden_act": "silu",
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
TASKS = ("copy", "int8", "fp8_dynamic")
BLOCK = 1 << 23


def main() -> None:
    """Print one JSON object, or, for --task, do it and print its time and peak."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--task", choices=TASKS)
    asked = parser.parse_args()
    model = asked.folder / "model"
    if asked.task:
        return json.dump(measured(asked.task, model, asked.folder / "out"), sys.stdout)
    if not model.is_dir():
        build(model)
    runs: dict[str, list[dict[str, float]]] = {task: [] for task in TASKS}
    for _ in range(asked.repeats):
        for task in TASKS:
            command = [sys.executable, __file__, "--folder", str(asked.folder), "--task", task]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            runs[task].append(json.loads(done.stdout))
    found = {
        "bytes": Checkpoint.open(model).nbytes,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "tasks": {task: summary(each) for task, each in runs.items()},
    }
    return json.dump(found, sys.stdout, indent=2)


def summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Medians, and every time that was measured."""
    return {
        "seconds": statistics.median(r["seconds"] for r in runs),
        "all_seconds": [r["seconds"] for r in runs],
        "peak_mb": statistics.median(r["peak_mb"] for r in runs),
        "written_bytes": runs[0]["written_bytes"],
    }


def build(model: Path) -> None:
    """A checkpoint of random weights, tensor by tensor."""
    model.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    shapes = expected_tensors(family_of(CONFIG), CONFIG)
    with TensorWriter(model, {n: ("BF16", s) for n, s in shapes.items()}) as writer:
        for name, shape in shapes.items():
            writer.write(name, (torch.randn(shape, generator=generator) * 0.02).bfloat16())
    write_companions(model, config=servable_config(CONFIG, dtype="bfloat16"), source=model)


def measured(task: str, model: Path, out: Path) -> dict[str, float]:
    """Do one task; seconds until all is on the disk, and MB held at most."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    torch.randn(4).to(torch.float8_e4m3fn)  # what is loaded when first used
    before, peak, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    copy(model, out) if task == "copy" else quantise(task, model, out)
    os.sync()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    written = sum(p.stat().st_size for p in out.iterdir())
    shutil.rmtree(out)
    return {"seconds": seconds, "peak_mb": (peak[0] - before) / 1e6, "written_bytes": written}


def copy(model: Path, out: Path) -> None:
    """Read, hash and write the weights."""
    for file in model.glob("*.safetensors"):
        digest = hashlib.sha256()
        with file.open("rb") as source, (out / file.name).open("wb") as target:
            while block := source.read(BLOCK):
                digest.update(block)
                target.write(block)


def quantise(form: str, model: Path, out: Path) -> None:
    """Write a form as an export does."""
    checkpoint = Checkpoint.open(model)
    dtypes = {name: entry.dtype for name, entry in checkpoint.entries.items()}
    layout = stored_layout(FORMS[form], checkpoint.family, checkpoint.config, dtypes=dtypes)
    with TensorWriter(out, layout, digests={}) as writer:
        write_compressed(
            checkpoint, writer, form=FORMS[form], layout=layout, on_event=lambda kind, fields: None
        )


def anonymous() -> int:
    """Bytes that this process holds besides mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()
