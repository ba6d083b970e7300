"""Rows S3, S4 and S11: no room left on the disk or in memory."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import namedtuple
from collections.abc import Iterator
from math import prod
from pathlib import Path

import pytest
import torch

from faults.conftest import Cli, fingerprint
from faults.pruner import Pruner
from faults.test_recipe_rows import RECIPE
from makers import PicoMaker
from paretron.artifacts.manifest import verify
from paretron.artifacts.reader import Checkpoint
from paretron.artifacts.writer import TensorWriter
from paretron.errors import Code
from paretron.families import expected_tensors, family_of
from picoscores import random_scores

DISK_TOLD = re.compile(r"(\d+) bytes(?: of (\d+))? needed, (\d+) bytes free")
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 KiB; only root may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def _refused_for_space(pruner: Pruner, out: Path) -> str:
    said = pruner.message()
    assert "fix:" in said
    assert DISK_TOLD.search(said), said
    assert not out.exists()
    assert not list(out.parent.glob(".*.staging"))
    return said


@pytest.mark.usefixtures("to_prune")
@pytest.mark.parametrize("largest_file", [1, 1000, 40_000])
def test_s3_no_file_may_grow(largest_file: int, pruner: Pruner, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pruner.start(out, largest_file=largest_file)
    assert pruner.end() == Code.DISK.exit
    _refused_for_space(pruner, out)
    pruner.start(out)
    assert pruner.end() == 0


@pytest.mark.usefixtures("to_prune")
def test_s3_full_at_every_single_write(pruner: Pruner, tmp_path: Path) -> None:
    out, writes, ended = tmp_path / "out", 0, Code.DISK.exit
    before = fingerprint([tmp_path / "model", tmp_path / "scores"])
    while True:
        pruner.start(out, writes=writes, max_shard_gb=2e-4)
        ended = pruner.end()
        if ended == 0:
            break
        assert ended == Code.DISK.exit
        _refused_for_space(pruner, out)
        writes += 1
    assert writes > 40  # every tensor, every header, config, tokenizer, index and manifest
    verify(out)
    assert fingerprint([tmp_path / "model", tmp_path / "scores"]) == before


@pytest.mark.usefixtures("to_prune")
def test_s3_a_disk_that_is_really_full(pruner: Pruner, small_disk: Path, tmp_path: Path) -> None:
    for name in ("model", "scores"):
        (small_disk / name).symlink_to(tmp_path / name)
    pruner.start(small_disk / "out")
    assert pruner.end() == Code.DISK.exit
    said = _refused_for_space(pruner, small_disk / "out")
    needed, free = (int(DISK_TOLD.search(said)[k]) for k in (1, 3))  # type: ignore[index]
    assert needed > 96 * 1024 > free


@pytest.fixture
def recipe(pico: PicoMaker, tmp_path: Path) -> Path:
    pico()
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def _needed(cli: Cli, recipe: Path, *more: str) -> int:
    planned = cli("plan", recipe, "--out", "run", "--offline", "--json", *more)
    return int(json.loads(planned.out)["disk_bytes"])


@pytest.mark.parametrize("verb", ["plan", "run"])
def test_s4_too_little_disk_on_the_volume_of_the_output(
    verb: str, cli: Cli, recipe: Path, small_disk: Path, tmp_path: Path
) -> None:
    before = fingerprint([tmp_path])
    outcome = cli(verb, recipe, "--out", small_disk / "run", "--offline")
    assert outcome.code == Code.DISK.exit
    assert str(small_disk / "run") in outcome.err
    assert "bytes needed" in outcome.err
    assert fingerprint([tmp_path]) == before
    assert not list(small_disk.iterdir())


def test_s4_to_the_byte(
    cli: Cli, recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    needed = _needed(cli, recipe)
    for free, code in ((needed, 0), (needed - 1, Code.DISK.exit)):
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda _, free=free: Usage(1 << 60, 0, free))
            outcome = cli("plan", recipe, "--out", tmp_path / "run", "--offline")
        assert outcome.code == code, outcome.err
    assert f"{needed} bytes needed" in outcome.err


def test_s4_counts_what_stands_beside_the_results(cli: Cli, recipe: Path) -> None:
    """Each student is there pruned, distilled and exported; training keeps two checkpoints."""
    planned = cli("plan", recipe, "--out", "run", "--offline", "--json")
    plan = json.loads(planned.out)
    disk = {s["name"]: s["disk_bytes"] for s in plan["stages"]}
    (name,) = plan["students"]
    weights = plan["students"][name]["weight_bytes"]
    params = plan["students"][name]["params"]
    assert disk[f"{name}.prune"] >= weights
    assert disk[f"{name}.distill"] >= weights + 2 * 12 * params
    assert plan["disk_bytes"] == sum(disk.values())


BIG = {
    "model_type": "llama", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 48000,
    "tie_word_embeddings": False, "hidden_act": "silu", "rms_norm_eps": 1e-5,
}  # fmt: skip
CAP = 320 << 20


@pytest.fixture
def big(tmp_path: Path) -> int:
    """A checkpoint larger than `CAP` and its scores; returns the bytes of its largest tensor."""
    model, scores = tmp_path / "model", tmp_path / "scores"
    model.mkdir()
    scores.mkdir()
    shapes = expected_tensors(family_of(BIG), BIG)
    largest = max(map(prod, shapes.values()))
    values = torch.randn(1 << 20).repeat(largest // (1 << 20) + 1)
    with TensorWriter(model, {n: ("F32", s) for n, s in shapes.items()}) as writer:
        for name, shape in shapes.items():
            writer.write(name, values[: prod(shape)].view(shape))
    (model / "config.json").write_text(json.dumps(BIG))
    checkpoint = Checkpoint.open(model)
    assert checkpoint.nbytes > 1.7 * CAP
    random_scores(checkpoint).save(scores)
    return 4 * largest


def test_s11_a_model_larger_than_memory(big: int, pruner: Pruner, tmp_path: Path) -> None:
    grown = tmp_path / "grown"
    pruner.start(tmp_path / "out", more_memory=CAP, max_shard_gb=0.2, grown=str(grown))
    assert pruner.end() == 0
    verify(tmp_path / "out")
    assert int(grown.read_text()) < CAP < 2 * big + (1 << 30)


def test_s11_too_little_memory_even_for_that(big: int, pruner: Pruner, tmp_path: Path) -> None:
    pruner.start(tmp_path / "out", more_memory=16 << 20)
    assert pruner.end() == Code.MEMORY.exit
    assert "fix:" in pruner.message()
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*.staging"))
