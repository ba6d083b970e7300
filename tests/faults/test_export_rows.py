"""Group E: what can go wrong with exports, and with what is told of models."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from faults.conftest import Cli, Refused
from makers import PicoMaker
from paretron import versions
from paretron.artifacts.writer import TensorWriter
from paretron.cli import doctor
from paretron.errors import Code
from report_example import example_report

SPOILT = "model.layers.1.mlp.up_proj.weight"
RECIPE = """\
schema: 1
teacher: {{model: ./model}}
data:
  calibration: {{corpus: stdlib, part: calibration, seq_len: 64}}
  train: {{corpus: stdlib, part: train, seq_len: 64}}
  validation: {{corpus: stdlib, part: validation, seq_len: 64}}
students:
  width: {{ffn: 64}}
distill:
  tokens: 1.0e5
  global_batch: 8
export: [{export}]
"""
Put = Callable[[str, torch.Tensor], torch.Tensor]
# Exporter and options -> the distribution it needs, and how it is installed.
NEEDS: Mapping[tuple[str, ...], tuple[str, str]] = {
    ("gguf",): ("gguf", 'pip install "paretron[gguf]"'),
    ("onnx",): ("onnxruntime-genai", 'pip install "paretron[onnx]"'),
    ("hf", "--quantize", "fp8"): ("nvidia-modelopt", 'pip install "paretron[quantize]"'),
    ("triton", "--backend", "vllm"): ("tritonclient", 'pip install "paretron[triton]"'),
}


def named(needs: tuple[str, ...]) -> str:
    return "-".join(text.strip("-") for text in needs)


@pytest.mark.parametrize("needs", NEEDS, ids=named)
@pytest.mark.parametrize(
    ("version", "code", "said"),
    [(None, Code.OPTIONAL_MISSING, "is not installed"), ("0.0.1", Code.OPTIONAL_OLD, "older than")],
    ids=["E1-absent", "E2-old"],
)
def test_what_an_export_needs(
    version: str | None, code: Code, said: str, needs: tuple[str, ...], pico: PicoMaker,
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    package, install = NEEDS[needs]
    real = versions.installed
    monkeypatch.setattr(versions, "installed", lambda n: version if n == package else real(n))
    model = pico(hidden_size=128, intermediate_size=128)
    refused(
        "export", model, "--out", tmp_path / "out", "--to", *needs,
        code=code, names=(f"{package} ", said, install),
    )  # fmt: skip


def test_e1_without_any_optional_package_the_rest_works(pico: PicoMaker, tmp_path: Path) -> None:
    """Whatever an exporter or engine needs cannot be imported, and models are still handled."""
    program = (
        "import sys\n"
        "for name in ('gguf', 'onnx', 'onnxruntime', 'onnxruntime_genai', 'modelopt', 'vllm',\n"
        "             'tensorrt_llm', 'tritonclient', 'onnxscript'):\n"
        "    sys.modules[name] = None\n"
        "from paretron.cli.main import main\n"
        "main(sys.argv[1:])\n"
    )
    model = pico(num_hidden_layers=2)
    done = subprocess.run(
        [sys.executable, "-c", program, "export", model, "--to", "hf", "--out", tmp_path / "o"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "o" / "manifest.json").is_file()


@pytest.mark.parametrize("package", versions.SAFE_FLOORS)
def test_e2_doctor_tells_a_known_vulnerability(
    package: str, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = versions.installed
    monkeypatch.setattr(doctor, "installed", lambda n: "0.9" if n == package else real(n))
    outcome = cli("doctor", "--json")
    assert outcome.code == Code.OPTIONAL_OLD.exit == 6
    assert json.loads(outcome.out)["below_floor"] == [package]


def spoil_writer(monkeypatch: pytest.MonkeyPatch, spoilt: Put) -> None:
    """What goes into safetensors files."""
    write = TensorWriter.write
    monkeypatch.setattr(TensorWriter, "write", lambda s, n, t: write(s, n, spoilt(n, t)))


def spoil_file(file: Path, start: int, spoilt: Put) -> None:
    """The float32 at a place of a file that was written."""
    data = bytearray(file.read_bytes())
    value = torch.from_numpy(np.frombuffer(data, np.float32, 1, start).copy())
    data[start : start + 4] = spoilt(SPOILT, value).numpy().tobytes()
    file.write_bytes(data)


def spoil_gguf(monkeypatch: pytest.MonkeyPatch, spoilt: Put) -> None:
    """The GGUF file."""
    from gguf import GGUFReader

    from paretron_exporters import gguf_file

    write = gguf_file.write_gguf

    def wrong(checkpoint: Any, path: Path, **more: Any) -> Any:
        notes = write(checkpoint, path, **more)
        tensors = {t.name: int(t.data_offset) for t in GGUFReader(path).tensors}
        spoil_file(path, tensors["blk.1.ffn_up.weight"], spoilt)
        return notes

    monkeypatch.setattr(gguf_file, "write_gguf", wrong)


def spoil_onnx(monkeypatch: pytest.MonkeyPatch, spoilt: Put) -> None:
    """The file of weights that the builder of graphs has written."""
    from paretron_exporters import genai
    from paretron_exporters.onnx_file import read_graph

    build = genai.build

    def wrong(checkpoint: Any, folder: Path, **more: Any) -> None:
        build(checkpoint, folder, **more)
        weights = read_graph(folder / "model.onnx").initialisers
        part = next(w for n, w in weights.items() if "layers.1.mlp.up_proj" in n)
        spoil_file(part.file, part.start, spoilt)

    monkeypatch.setattr(genai, "build", wrong)


# Exporter and options -> where the error gets in, and the tensor's name there.
WRITERS: Mapping[tuple[str, ...], tuple[Callable[..., None], str]] = {
    ("hf",): (spoil_writer, SPOILT),
    ("hf", "--dtype", "bfloat16"): (spoil_writer, SPOILT),
    ("gguf",): (spoil_gguf, SPOILT),
    ("onnx",): (spoil_onnx, SPOILT),
    ("trtllm",): (spoil_writer, SPOILT),
    ("trtllm_engine",): (spoil_writer, "transformer.layers.1.mlp.gate.weight"),
    ("triton", "--backend", "vllm"): (spoil_writer, SPOILT),
}


@pytest.mark.parametrize("export", WRITERS, ids=named)
def test_e3_an_error_of_a_hundredth_in_one_tensor(
    export: tuple[str, ...], pico: PicoMaker, refused: Refused, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    spoil, tensor = WRITERS[export]
    seen: list[str] = []

    def spoilt(name: str, values: torch.Tensor) -> torch.Tensor:
        if name != tensor:
            return values
        seen.append(name)
        return values + 1e-2

    model = pico(num_hidden_layers=2)
    spoil(monkeypatch, spoilt)
    outcome = refused(
        "export", model, "--out", tmp_path / "out", "--to", *export, "-q",
        code=Code.GATE_PARITY, names="layers.1.mlp.",
    )  # fmt: skip
    assert seen
    assert tensor in outcome.err
    assert not (tmp_path / "out").exists()


# id -> the teacher's family, the export, what the message names
UNSUPPORTED: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "E4-family": ("gemma2", "{to: gguf}", ("gemma2", "llama")),
    "E4-dtype": ("llama", "{to: onnx, dtype: bfloat16}", ("bfloat16", "float32")),
    "E4-form": ("llama", "{to: hf, quantize: q4_k}", ("q4_k", "int8")),
    "E4-setting": ("llama", "{to: gguf, tensor_parallel: 2}", ("tensor_parallel", "quantize")),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_a_form_does_not_take_is_told_by_the_plan(
    case: str, pico: PicoMaker, refused: Refused, tmp_path: Path
) -> None:
    family, export, names = UNSUPPORTED[case]
    pico(family)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(export=export))
    refused("plan", tmp_path / "recipe.yaml", code=Code.UNSUPPORTED, names=names)


# id -> changes of the teacher, the export, what the message names
INDIVISIBLE: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "E5-heads": (
        {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96},
        "{to: trtllm, tensor_parallel: 2}", ("kv_heads", "3"),
    ),
    "E5-heads-engine": ({}, "{to: trtllm_engine, tensor_parallel: 3}", ("heads", "3")),
    "E5-ffn": ({}, "{to: trtllm, tensor_parallel: 4}", ("ffn", "66")),
    "E5-vocab": ({"vocab_size": 321}, "{to: trtllm, tensor_parallel: 2}", ("vocab", "321")),
}  # fmt: skip


@pytest.mark.parametrize("case", INDIVISIBLE)
def test_a_degree_that_does_not_divide_is_told_by_the_plan(
    case: str, pico: PicoMaker, refused: Refused, tmp_path: Path
) -> None:
    config, export, names = INDIVISIBLE[case]
    pico(**config)
    text = RECIPE.format(export=export)
    if case == "E5-ffn":
        text = text.replace("ffn: 64", "ffn: 66")
    (tmp_path / "recipe.yaml").write_text(text)
    refused("plan", tmp_path / "recipe.yaml", code=Code.RECIPE_VALUE, names=names)


def test_e11_hostile_names_and_no_number(tmp_path: Path) -> None:
    from paretron_profiling.report.page import write_report

    hostile = "<script>window.hacked=1</script>\"'\n</title>"
    content = example_report(title=hostile)
    content["models"][1] |= {"name": hostile, "loss": {"pruned": math.nan, "final": math.inf}}
    for speedup in content["speedup"]:
        speedup["model"] = hostile if speedup["model"] == "width" else speedup["model"]
        speedup["ratio"] = math.nan
    write_report(content, out=tmp_path)
    written = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert written["models"][1]["name"] == hostile
    assert written["models"][1]["loss"] == {"pruned": None, "final": None}
    assert {s["ratio"] for s in written["speedup"]} == {None}
    page = (tmp_path / "report.html").read_text()
    assert "<script>window.hacked" not in page
    plain = tmp_path / "plain"
    plain.mkdir()
    write_report(example_report(), out=plain)
    for tag in ("<script", "</script", "</title"):
        assert page.count(tag) == (plain / "report.html").read_text().count(tag)


def test_e11_a_card_says_them_as_text(pico: PicoMaker, cli: Cli, tmp_path: Path) -> None:
    name = "<script>alert(1)</script>\"'"
    model = pico(name=name.replace("/", ""), num_hidden_layers=2)
    outcome = cli("export", model, "--to", "hf", "--out", tmp_path / "out", "--json")
    assert outcome.code == 0, outcome.err
    json.loads(outcome.out, parse_constant=pytest.fail)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "<script>" not in card
