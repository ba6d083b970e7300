"""Surgery against the disk: `paretron prune` and a plain copy of as many bytes, timed as JSON.

python tests/benchmarks/surgery.py --folder /data/bench --repeats 3

Builds a checkpoint of Llama-3.1-8B's shape (random bf16, four shards) and scores for it, or takes
the ones that are in the folder already, and prunes it to 4B by width and by depth through the
command line. As after `paretron score`, the model's hash is remembered; one more run has it still
to make.

The plain program reads the bytes that are needed (those of the kept rows) and writes as many as the
student has, synced: once through the page cache as any program does, once dropping what it has
used, as `prune` does, which alone can be twice as fast on a virtual machine. Before each command
its input leaves the page cache (posix_fadvise, no rights needed); the order alternates. Peaks are
of the process alone, read from /proc while it runs: VmHWM counts mapped files, RssAnon does not.
Every command's time goes to standard error at once.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from math import prod
from pathlib import Path
from typing import Any

from paretron.artifacts.config import read_config
from paretron.artifacts.headers import read_header
from paretron.families import expected_tensors, family_of, sizes
from paretron.families.table import with_sizes

TESTS = Path(__file__).resolve().parents[1]
CONFIG: Mapping[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "rope_theta": 500000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "hidden_act": "silu",
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "bos_token_id": 128000,
    "eos_token_id": 128001, "attention_bias": False, "mlp_bias": False,
    "rope_scaling": {
        "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
}  # fmt: skip
PUBLISHED = {"width": 4512746496, "depth": 4540469248}  # parameters at scale 1
BLOCK = 1 << 23
MB = 1e6


def scaled(scale: float) -> dict[str, Any]:
    """The config with fewer layers and tokens; matrices keep their shapes."""
    layers = max(2, round(CONFIG["num_hidden_layers"] * scale))
    vocab = max(64, round(CONFIG["vocab_size"] * scale / 64) * 64)
    return {
        **CONFIG, "num_hidden_layers": layers, "vocab_size": vocab,
        "bos_token_id": vocab - 2, "eos_token_id": vocab - 1,
    }  # fmt: skip


def build(folder: Path, scale: float) -> None:
    """Write the checkpoint `folder`/model and `folder`/scores, each unless it is there."""
    import torch
    from tokenizers import Tokenizer, models

    from paretron.artifacts.reader import Checkpoint
    from paretron.artifacts.writer import TensorWriter
    from paretron.run.memory import input_identity

    sys.path.insert(0, str(TESTS))
    from picoscores import random_scores

    model, scores, config = folder / "model", folder / "scores", scaled(scale)
    if not (model / "config.json").is_file():
        shutil.rmtree(model, ignore_errors=True)
        model.mkdir(parents=True)
        shapes = expected_tensors(family_of(config), config)
        largest = max(map(prod, shapes.values()))
        values = torch.randn(1 << 23, generator=torch.Generator().manual_seed(0)) * 0.02
        few = values.bfloat16()
        pool = few.repeat(largest // len(few) + 2)  # tensors are windows of it that differ
        layout = {name: ("BF16", shape) for name, shape in shapes.items()}
        total = 2 * sum(map(prod, shapes.values()))
        with TensorWriter(model, layout, max_shard_bytes=int(total / 3.8)) as writer:
            for k, (name, shape) in enumerate(shapes.items()):
                start = k * 104729 % len(few)
                writer.write(name, pool[start : start + prod(shape)].view(shape))
        Tokenizer(models.WordLevel({"word": 0}, unk_token="word")).save(
            str(model / "tokenizer.json")
        )
        (model / "config.json").write_text(json.dumps(config, indent=1))
    if sizes(family_of(config), read_config(model)) != sizes(family_of(config), config):
        raise SystemExit(f"{model} is of another scale: name another --folder")
    if not (scores / "scores.json").is_file():
        shutil.rmtree(scores, ignore_errors=True)
        scores.mkdir()
        random_scores(Checkpoint.open(model)).save(scores)
    os.environ["PARETRON_CACHE"] = str(folder / "cache")
    input_identity(model)  # `paretron score` leaves the hash of the model it has read
    os.sync()


def targets(config: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """What each student is cut to, by the option's name."""
    return {
        "width": {"hidden": 3072, "ffn": 9216},
        "depth": {"layers": config["num_hidden_layers"] // 2},
    }


def shapes_of(config: Mapping[str, Any], target: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a student; a depth student keeps the first layers."""
    family = family_of(config)
    size = {**sizes(family, config), **target}
    kept = tuple(range(size["layers"])) if "layers" in target else None
    return expected_tensors(family, with_sizes(family, config, size, kept_layers=kept))


def plain(model: Path, student: str, out: Path, *, drop: bool) -> None:
    """Read what a student needs of each tensor and write as many bytes as it has, synced.

    With `drop` pages leave the page cache as soon as they are used, which `prune` does as well.
    """
    import random

    config = read_config(model)
    entries = {n: e for f in sorted(model.glob("*.safetensors")) for n, e in read_header(f).items()}
    chosen, block = random.Random(0), memoryview(bytearray(BLOCK))
    files = {e.file: os.open(e.file, os.O_RDONLY) for e in entries.values()}
    to = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for name, shape in shapes_of(config, targets(config)[student]).items():
        entry = entries[name]
        row_bytes, new_row_bytes = (
            entry.nbytes // entry.shape[0],
            2 * prod(shape[1:]),
        )
        kept = sorted(chosen.sample(range(entry.shape[0]), shape[0]))
        at_once = BLOCK // row_bytes
        for first in range(0, len(kept), at_once):
            rows = kept[first : first + at_once]
            _read_rows(files[entry.file], entry.start, rows, row_bytes, block)
            os.write(to, block[: len(rows) * new_row_bytes])
            if drop:
                start = entry.start + rows[0] * row_bytes
                used = (rows[-1] + 1 - rows[0]) * row_bytes
                os.posix_fadvise(files[entry.file], start, used, os.POSIX_FADV_DONTNEED)
                os.posix_fadvise(to, 0, 0, os.POSIX_FADV_DONTNEED)
    os.fsync(to)


def _read_rows(fd: int, start: int, rows: Sequence[int], row_bytes: int, into: memoryview) -> None:
    """Rows that follow each other by one read."""
    run = 0
    for k in range(1, len(rows) + 1):
        if k == len(rows) or rows[k] != rows[k - 1] + 1:
            where = start + rows[run] * row_bytes
            if os.preadv(fd, [into[run * row_bytes : k * row_bytes]], where) <= 0:
                raise EOFError(where)
            run = k


def uncache(folder: Path) -> None:
    """Take the files of a folder out of the page cache."""
    os.sync()
    for path in folder.iterdir():
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def measured(
    command: Sequence[str | Path], *, log: Path, cache: Path, codes: Sequence[int] = (0,)
) -> dict[str, float]:
    """Run a command and return its wall time, its CPU time and its peaks of memory."""
    start, peaks = time.perf_counter(), {"VmHWM": 0, "RssAnon": 0}
    environment = os.environ | {"PARETRON_CACHE": str(cache)}
    with log.open("w") as said:
        child = subprocess.Popen(
            [str(c) for c in command], stdout=said, stderr=said, env=environment
        )
        status = Path(f"/proc/{child.pid}/status")
        while True:
            pid, code, usage = os.wait4(child.pid, os.WNOHANG)
            if pid:
                break
            for line in status.read_text().splitlines():
                key, _, value = line.partition(":")
                if key in peaks:
                    peaks[key] = max(peaks[key], int(value.split()[0]))
            time.sleep(0.02)
    seconds = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(code)
    if child.returncode not in codes:
        tail = log.read_text()[-600:]
        raise RuntimeError(f"exit {child.returncode}: {tail}")
    print(f"{seconds:7.2f} s  {' '.join(map(str, command))[:120]}", file=sys.stderr)
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_mb": round(peaks["VmHWM"] * 1024 / MB),
        "peak_anonymous_mb": round(peaks["RssAnon"] * 1024 / MB),
    }


def parameters(folder: Path) -> int:
    """Parameters by the headers of the shards."""
    headers = [read_header(f) for f in folder.glob("*.safetensors")]
    return sum(prod(e.shape) for header in headers for e in header.values())


def compare(folder: Path, student: str, repeats: int) -> dict[str, Any]:
    """The command line and the plain program by turns."""
    model, out = folder / "model", folder / "out"
    target = targets(read_config(model))[student]
    options = [part for axis, size in target.items() for part in (f"--{axis}", str(size))]
    prune: list[str | Path] = [
        sys.executable, "-m", "paretron", "prune", model, "--scores", folder / "scores",
        "--out", out, *options, "-q",
    ]  # fmt: skip
    copy: list[str | Path] = [sys.executable, __file__, "--plain", student, "--folder", folder]
    commands = {"plain": copy, "paretron": prune, "plain_dropping": [*copy, "--drop"]}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    counted, log = 0, folder / "log.txt"
    for turn in range(repeats):
        for name in list(commands)[:: -1 if turn % 2 else 1]:
            uncache(model)
            runs[name].append(measured(commands[name], log=log, cache=folder / "cache"))
            if name == "paretron":
                counted = parameters(out)
                shutil.rmtree(out)
            else:
                (folder / "plain.bin").unlink()
    uncache(model)
    unknown = measured(prune, log=log, cache=folder / "nothing")  # no hash is remembered there
    shutil.rmtree(out)
    shutil.rmtree(folder / "nothing")
    medians = {k: statistics.median(r["seconds"] for r in v) for k, v in runs.items()}
    return {
        **runs,
        "paretron_input_never_hashed": unknown,
        "median_seconds": medians,
        "time_ratio": round(medians["paretron"] / medians["plain"], 3),
        "time_ratio_dropping": round(medians["paretron"] / medians["plain_dropping"], 3),
        "parameters": counted,
        "peak_mb": max(r["peak_mb"] for r in runs["paretron"]),
    }


def mergekit(folder: Path, python: Path) -> dict[str, Any]:
    """Depth by mergekit's passthrough: the first three quarters of what stays, and the last."""
    layers = int(read_config(folder / "model")["num_hidden_layers"])
    kept = layers // 2
    ranges = ([0, kept - kept // 4], [layers - kept // 4, layers])
    slices = [{"sources": [{"model": str(folder / "model"), "layer_range": r}]} for r in ranges]
    recipe = {"slices": slices, "merge_method": "passthrough", "dtype": "bfloat16"}
    (folder / "mergekit.yaml").write_text(json.dumps(recipe))
    command = [python.parent / "mergekit-yaml", folder / "mergekit.yaml", folder / "other"]
    return _other(folder, [*command, "--no-copy-tokenizer", "--no-write-model-card"])


def torch_pruning(folder: Path, python: Path) -> dict[str, Any]:
    """Width by Torch-Pruning, which needs the model in memory."""
    target = targets(read_config(folder / "model"))["width"]
    script = Path(__file__).with_name("surgery_torch_pruning.py")
    sizes_ = [str(target["hidden"]), str(target["ffn"])]
    return _other(folder, [python, script, folder / "model", folder / "other", *sizes_])


def _other(folder: Path, command: Sequence[str | Path]) -> dict[str, Any]:
    """Another tool's run, or how it failed."""
    uncache(folder / "model")
    try:
        run: dict[str, Any] = measured(command, log=folder / "log.txt", cache=folder / "cache")
        return run | {"parameters": parameters(folder / "other")}
    except RuntimeError as error:
        return {"failed": str(error)}
    finally:
        shutil.rmtree(folder / "other", ignore_errors=True)


def reading_verbs(folder: Path) -> dict[str, Any]:
    """`plan` and `inspect` on the checkpoint, three times each."""
    (folder / "text.txt").write_text("a line\n" * 100)
    source = {"path": "text.txt", "seq_len": 512}
    recipe = {
        "schema": 1,
        "teacher": {"model": "./model"},
        "data": {
            "calibration": source | {"samples": 1024},
            "train": source,
            "validation": source | {"tokens": 51200},
        },
        "students": targets(read_config(folder / "model")),
        "distill": {"tokens": 10_000_000},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    found: dict[str, Any] = {}
    for verb, argument in (("plan", "recipe.yaml"), ("inspect", "model")):
        runs = []
        for _ in range(3):
            uncache(folder / "model")
            command: list[str | Path] = [
                sys.executable, "-m", "paretron", verb, folder / argument, "--json"
            ]  # fmt: skip
            # Planning ends with 4 where this machine has not the memory or disk to train.
            runs.append(
                measured(command, log=folder / "log.txt", cache=folder / "cache", codes=(0, 4))
            )
        found[verb] = runs
    return found


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_AS_IT_IS)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--scale", type=float, default=1.0, help="1 is 8B; layers and vocabulary")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=["width", "depth", "verbs", "others", "build"])
    parser.add_argument("--mergekit-python", type=Path, help="an interpreter that has mergekit")
    parser.add_argument("--torch-pruning-python", type=Path, help="one that has torch-pruning")
    parser.add_argument("--plain", choices=["width", "depth"], help=argparse.SUPPRESS)
    parser.add_argument("--drop", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    folder = a.folder.absolute()
    if a.plain:
        plain(folder / "model", a.plain, folder / "plain.bin", drop=a.drop)
        return
    if a.only == "build":
        build(folder, a.scale)
        return
    made = subprocess.run(
        [sys.executable, __file__, "--only", "build", "--folder", folder, "--scale", str(a.scale)],
        check=True,
    )
    assert made.returncode == 0
    report: dict[str, Any] = {
        "checkpoint": {
            "parameters": parameters(folder / "model"),
            "shards": len(list((folder / "model").glob("*.safetensors"))),
        },
        "machine": {"cpus": os.cpu_count(), "load": os.getloadavg()},
        "versions": {n: metadata.version(n) for n in ("paretron", "torch", "numpy")}
        | {"python": platform.python_version()},
        "caches": "posix_fadvise(DONTNEED) of every input file before each command, after sync",
    }
    for student in PUBLISHED:
        if a.only in (None, student):
            report[student] = compare(folder, student, a.repeats)
            if a.scale == 1.0 and report[student]["parameters"] != PUBLISHED[student]:
                raise SystemExit(f"{student}: {report[student]['parameters']} parameters")
    if a.only in (None, "verbs"):
        report["verbs"] = reading_verbs(folder)
    if a.mergekit_python:
        report["mergekit_depth"] = mergekit(folder, a.mergekit_python.absolute())
    if a.torch_pruning_python:
        report["torch_pruning_width"] = torch_pruning(folder, a.torch_pruning_python.absolute())
    report["machine"]["load_after"] = os.getloadavg()
    print(json.dumps(report, indent=1))


_AS_IT_IS = argparse.RawDescriptionHelpFormatter

if __name__ == "__main__":
    main()
