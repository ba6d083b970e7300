"""Group E, of engines: what one needs and this machine lacks is said before any work."""

from __future__ import annotations

import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from faults.conftest import Refused, run_and_measure
from makers import PicoMaker
from paretron import versions
from paretron.errors import Code

MonkeyPatch = pytest.MonkeyPatch


def without(package: str, version: str | None) -> Callable[[MonkeyPatch], None]:
    """A package that is not installed, or in this version."""

    def lacking(patch: MonkeyPatch) -> None:
        real = versions.installed
        patch.setattr(versions, "installed", lambda n: version if n == package else real(n))

    return lacking


def without_programs(patch: MonkeyPatch) -> None:
    """Nothing is on the path: no compiler, no server."""
    patch.setattr(shutil, "which", lambda *_, **__: None)


# id -> engine, what is missing, the code, and what the message must name
NEEDS = {
    "E1-ortgenai": (
        "ortgenai", without("onnxruntime-genai", None), Code.OPTIONAL_MISSING,
        ("onnxruntime-genai", 'pip install "paretron[onnx]"'),
    ),
    "E2-ortgenai": (
        "ortgenai", without("onnxruntime-genai", "0.0.1"), Code.OPTIONAL_OLD,
        ("onnxruntime-genai 0.0.1", "older than"),
    ),
    "E1-compiler": (
        "transformers_compiled", without_programs, Code.OPTIONAL_MISSING,
        ("needs a C++ compiler", "install g++"),
    ),
    "E1-trtllm": (
        "trtllm", without_programs, Code.OPTIONAL_MISSING, ("no trtllm-serve", "tensorrt_llm"),
    ),
}  # fmt: skip


def in_every_form(model: Path) -> str:
    """A model as `profile` takes it, with folders that look like its exports."""
    onnx, trtllm = model.with_name("onnx"), model.with_name("trtllm")
    onnx.mkdir()
    (onnx / "model.onnx").write_bytes(b"")
    trtllm.mkdir()
    (trtllm / "llm_config.yaml").write_text("max_seq_len: 512\n")
    return f"teacher={model},{onnx},{trtllm}"


@pytest.mark.parametrize("id", NEEDS)
def test_what_an_engine_needs(
    id: str, pico: PicoMaker, tmp_path: Path, refused: Refused, monkeypatch: MonkeyPatch
) -> None:
    engine, lacking, code, names = NEEDS[id]
    lacking(monkeypatch)
    model = in_every_form(pico())
    refused("profile", model, "--engine", engine, "--out", tmp_path / "out", code=code, names=names)


def engine_without_gpu(name: str, bin_folder: Path) -> str:
    """An engine whose environment is there, on a machine without a GPU, as `--engine` takes it."""
    bin_folder.mkdir()
    python = bin_folder / "python"
    if name == "trtllm":
        python.symlink_to(sys.executable)
        (bin_folder / "trtllm-serve").write_text("#!/bin/sh\nexit 1\n")
    else:
        # What our probe of an interpreter prints where vLLM is built for CPUs.
        python.write_text('#!/bin/sh\necho \'{"vllm": "0.32.0", "torch": "2.13.0+cpu"}\'\n')
        python.chmod(0o755)
    return f"{name}={python}"


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a GPU")
@pytest.mark.parametrize("name", ["trtllm", "vllm_fp8"])
def test_e10_no_gpu_for_an_engine_of_gpus(
    name: str, pico: PicoMaker, tmp_path: Path, refused: Refused
) -> None:
    engine = engine_without_gpu(name, tmp_path / "bin")
    command = ("profile", in_every_form(pico()), "--engine", engine, "--out", tmp_path / "out")
    outcome = refused(*command, code=Code.DEVICE, names=("needs an NVIDIA GPU", name))
    (said,) = (line for line in outcome.err.splitlines() if line.startswith("error: "))
    assert not (tmp_path / "out").exists()

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code, _, heavy = run_and_measure(*command)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Time of the processor, which does not grow with what else runs here.
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert (code, heavy) == (4, [])
    assert seconds < 2, said
