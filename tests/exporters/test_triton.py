"""Triton repositories: their layout, what Triton's protobuf and our lint see, what plan refuses."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

from makers import PicoMaker
from paretron.artifacts.config import read_config
from paretron.artifacts.manifest import Provenance, verify
from paretron.artifacts.writer import TensorWriter
from paretron.errors import Code, ParetronError
from paretron.plugins import EXPORTERS, find_plugin
from paretron.recipe import Export
from paretron_exporters import hf, onnx, triton_lint
from paretron_exporters.triton import EXPORTER, computed_in
from paretron_exporters.triton_lint import KEYS, lint
from paretron_exporters.triton_lint import read_config as read_pbtxt
from paretron_exporters.triton_repository import BACKENDS, NAMES, STARTED_FROM

pytest.importorskip("tritonclient.grpc")

SERVING = {"max_batch_size": 8, "max_num_tokens": 256, "max_seq_len": 128, "gpu_memory": 0.5}


def export(source: Path, out: Path, **asked: Any) -> Any:
    return EXPORTER.export(
        source,
        export=Export.model_validate({"to": "triton"} | asked),
        out=out,
        provenance=Provenance(kind="export", parents={"model": "0" * 64}),
        on_event=lambda kind, fields: None,
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A repository of each backend, made once; a test that changes one copies it."""
    from pico import make_pico

    folder = tmp_path_factory.mktemp("made")
    source = make_pico(folder / "model", num_hidden_layers=2)

    def get(backend: str) -> Path:
        out = folder / backend
        if not out.exists():
            export(source, out, backend=backend, serving=SERVING)
        return out

    return get


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_layout_is_what_a_server_looks_for(made: Any, backend: Any, tmp_path: Path) -> None:
    repository = made(backend)
    name = NAMES[backend]
    verify(repository)
    verify(repository / name / "1/weights")  # an artifact of its own, wherever it is taken
    assert sorted(p.name for p in repository.iterdir()) == sorted([
        "README.md", "client_grpc.py", "client_http.py", "manifest.json", "parity.json", name,
    ])  # fmt: skip
    assert "own tests: Triton Inference Server" in (repository / "README.md").read_text()
    assert sorted(p.name for p in (repository / name).iterdir()) == ["1", "config.pbtxt"]
    assert sorted(p.name for p in (repository / name / "1").iterdir()) == sorted([
        STARTED_FROM[backend], "weights",
    ])  # fmt: skip
    config = read_pbtxt((repository / name / "config.pbtxt").read_text())
    assert config.name == name
    assert json.loads((repository / "parity.json").read_text())["passed"] is True


def test_vllm_is_told_what_was_asked_for(made: Any) -> None:
    said = json.loads((made("vllm") / "llm/1/model.json").read_text())
    assert said == {
        "model": "/models/llm/1/weights", "dtype": "float32",
        "tensor_parallel_size": 1, "pipeline_parallel_size": 1, "max_model_len": 128,
        "max_num_seqs": 8, "max_num_batched_tokens": 256,
        "gpu_memory_utilization": 0.5,
    }  # fmt: skip
    assert set(said) == KEYS["model.json"]


def test_trtllm_is_told_what_was_asked_for(made: Any) -> None:
    path = made("trtllm") / "tensorrt_llm/1/model.yaml"
    assert YAML(typ="safe").load(path.read_text()) == {
        "model": "/models/tensorrt_llm/1/weights", "backend": "pytorch",
        "tensor_parallel_size": 1, "pipeline_parallel_size": 1, "max_batch_size": 8,
        "max_num_tokens": 256, "max_seq_len": 128,
        "kv_cache_config": {"free_gpu_memory_fraction": 0.5, "dtype": "auto"},
        "cuda_graph_config": {"enable_padding": True},
        "triton_config": {"max_batch_size": 0, "decoupled": True},
    }  # fmt: skip
    # What is vendored would fall behind the release that runs.
    assert not list(made("trtllm").rglob("model.py"))


def test_vllm_knows_every_key() -> None:
    """By vLLM's own class, read but not imported."""
    python = os.environ.get("PARETRON_VLLM_PYTHON")
    if not python:
        pytest.skip("PARETRON_VLLM_PYTHON names no interpreter that has vLLM")
    find = "import importlib.util as u; print(u.find_spec('vllm').submodule_search_locations[0])"
    package = subprocess.run([python, "-c", find], capture_output=True, text=True, check=True)
    tree = ast.parse((Path(package.stdout.strip()) / "engine/arg_utils.py").read_text("utf-8"))
    known = {
        line.target.id
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name in ("EngineArgs", "AsyncEngineArgs")
        for line in node.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    }
    assert len(known) > 50
    assert KEYS["model.json"] <= known


@pytest.mark.parametrize(
    ("dtype", "method", "stated"),
    [
        ("float32", None, "float32"), ("float32", "compressed-tensors", "float32"),
        ("float32", "modelopt", "bfloat16"), ("float16", "modelopt", "float16"),
    ],
)  # fmt: skip
def test_no_dtype_is_stated_that_kernels_refuse(dtype: str, method: Any, stated: str) -> None:
    """By what vLLM's classes say they take: modelopt's forms no float32, compressed ones all."""
    said = {"quantization_config": {"quant_method": method}} if method else {}
    assert computed_in({"dtype": dtype} | said) == stated


@pytest.mark.parametrize("backend", ["trtllm", "vllm"])
def test_degrees_and_dtype_reach_engine_and_weights(
    pico: PicoMaker, tmp_path: Path, backend: str
) -> None:
    out = tmp_path / "out"
    asked = {"backend": backend, "tensor_parallel": 2, "pipeline_parallel": 2}
    report = export(pico(), out, dtype="bfloat16", **asked)
    folder = out / NAMES[backend] / "1"  # type: ignore[index]
    said = YAML(typ="safe").load((folder / STARTED_FROM[backend]).read_text())  # type: ignore[index]
    assert (said["tensor_parallel_size"], said["pipeline_parallel_size"]) == (2, 2)
    assert (said.get("max_model_len") or said["max_seq_len"]) == 512  # all that the model knows
    assert read_config(folder / "weights")["dtype"] == "bfloat16"
    assert "BF16" in report.candidate


Change = Callable[[Path], object]


def replace(name: str, old: str, new: str) -> Change:
    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return change


BROKEN: Mapping[str, tuple[str, Change, str]] = {
    "unknown field": (
        "vllm", replace("llm/config.pbtxt", "backend:", "backened:"), 'no field named "backened"'),
    "unknown enum": (
        "vllm", replace("llm/config.pbtxt", "KIND_MODEL", "KIND_TPU"), "KIND_TPU"),
    "wrong type": (
        "onnx", replace("llm/config.pbtxt", "max_batch_size: 0", 'max_batch_size: "x"'), "integer"),
    "other name": (
        "vllm", replace("llm/config.pbtxt", 'name: "llm"', 'name: "lm"'), "folder is 'llm'"),
    "other backend": (
        "vllm", replace("llm/config.pbtxt", '"vllm"', '"onnxruntime"'), "instead of 'vllm'"),
    "batches by Triton": (
        "onnx", replace("llm/config.pbtxt", "max_batch_size: 0", "max_batch_size: 4"), "batches"),
    "no config": ("vllm", lambda f: (f / "llm/config.pbtxt").unlink(), "no such file"),
    "no version": ("vllm", lambda f: (f / "llm/1").rename(f / "llm/v1"), "version folders v1"),
    "two models": ("vllm", lambda f: (f / "weights").mkdir(), "folders llm, weights"),
    "unknown key": (
        "vllm", replace("llm/1/model.json", "max_model_len", "max_len"), "unknown key 'max_len'"),
    "no JSON": ("vllm", replace("llm/1/model.json", "{", ""), "cannot be read"),
    "no YAML": (
        "trtllm", replace("tensorrt_llm/1/model.yaml", "backend:", "{backend:"), "cannot be read"),
    "unknown key in YAML": (
        "trtllm", replace("tensorrt_llm/1/model.yaml", "max_seq_len", "seq"), "unknown key 'seq'"),
    "path elsewhere": (
        "vllm", replace("llm/1/model.json", "/models/llm", "/srv/llm"), "outside of /models"),
    "path upwards": (
        "vllm", replace("llm/1/model.json", "/models/llm", "/models/../etc"), "outside of /models"),
    "path to nothing": (
        "trtllm", replace("tensorrt_llm/1/model.yaml", "1/weights", "1/weight"), "nothing in"),
    "name of a hub": (
        "vllm", replace("llm/1/model.json", "/models/llm/1/weights", "a/b"), "no path"),
    "no model.py": ("onnx", lambda f: (f / "llm/1/model.py").unlink(), "no such file"),
    "no graph": (
        "onnx", lambda f: (f / "llm/1/weights/genai_config.json").unlink(), "no such file"),
    "a link": ("vllm", lambda f: (f / "llm/1/x").symlink_to("weights"), "a link"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_the_lint_sees_what_a_server_would_refuse(made: Any, tmp_path: Path, what: str) -> None:
    backend, change, told = BROKEN[what]
    copy = Path(shutil.copytree(made(backend), tmp_path / "copy"))
    assert lint(copy, backend=backend) == []  # type: ignore[arg-type]
    change(copy)
    found = lint(copy, backend=backend)  # type: ignore[arg-type]
    assert len(found) == 1, found
    assert told in found[0].cause
    assert found[0].code is Code.GATE_RELOAD


def test_nothing_that_the_lint_refuses_is_published(
    pico: PicoMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = {"model.json": KEYS["model.json"] - {"max_num_seqs"}}
    monkeypatch.setattr(triton_lint, "KEYS", allowed)
    with pytest.raises(ParetronError, match="max_num_seqs") as caught:
        export(pico(), tmp_path / "out", backend="vllm")
    assert caught.value.exit_code == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_E3_wrong_weights_are_not_published(  # noqa: N802
    pico: PicoMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    write = TensorWriter.write

    def wrong(self: TensorWriter, tensor: str, value: torch.Tensor) -> None:
        write(self, tensor, value + 1e-2 if tensor == name else value)

    monkeypatch.setattr(TensorWriter, "write", wrong)
    with pytest.raises(ParetronError, match=name.replace(".", r"\.")) as caught:
        export(pico(), tmp_path / "out", backend="vllm")
    assert caught.value.exit_code == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def problems(config: Mapping[str, Any], **asked: Any) -> list[tuple[Code, str, str]]:
    section = Export.model_validate({"to": "triton"} | asked)
    found = EXPORTER.problems(config, export=section)
    return [(p.code, p.where, p.cause) for p in found]


def test_plan_says_what_cannot_be(pico: PicoMaker) -> None:
    config = read_config(pico())
    assert problems(config, backend="vllm", serving=SERVING) == []
    ((code, where, cause),) = problems(config)
    assert (code, where, cause) == (Code.RECIPE_VALUE, "export.backend", "no backend")
    ((code, where, cause),) = problems(config, backend="tgi")
    assert (code, cause) == (Code.RECIPE_VALUE, "triton knows no backend 'tgi'")
    found = problems(config, backend="vllm", tensor_parallel=3)
    assert {c for c, _, _ in found} == {Code.RECIPE_VALUE}
    assert "heads is 4, which 3 devices cannot share" in {cause for _, _, cause in found}
    ((code, _, cause),) = problems(config, backend="trtllm", pipeline_parallel=5)
    assert (code, cause) == (Code.RECIPE_VALUE, "4 layers cannot be spread over 5 devices")
    ((code, where, cause),) = problems(config, backend="vllm", serving={"max_seq_len": 513})
    assert (code, where) == (Code.RECIPE_VALUE, "export.serving.max_seq_len")
    assert cause == "513 tokens, but the model knows 512 positions"
    few = {"max_batch_size": 9, "max_num_tokens": 8}
    ((code, where, _),) = problems(config, backend="vllm", serving=few)
    assert (code, where) == (Code.RECIPE_VALUE, "export.serving.max_num_tokens")
    ((code, where, _),) = problems(config, backend="vllm", device="cuda")
    assert (code, where) == (Code.UNSUPPORTED, "export.device")
    ((code, where, _),) = problems(config, backend="onnx", tensor_parallel=2)
    assert (code, where) == (Code.UNSUPPORTED, "export.tensor_parallel")
    ((code, _, cause),) = problems(config, backend="onnx", dtype="bfloat16")
    assert code is Code.UNSUPPORTED
    assert cause.startswith("onnx cannot export bfloat16")


def test_what_an_engine_cannot_do_is_said(pico: PicoMaker) -> None:
    """No graph and no class of olmo2; vLLM takes another head_dim for qwen2."""
    olmo2 = read_config(pico("olmo2"))
    for backend in ("onnx", "trtllm"):
        assert problems(olmo2, backend=backend)[0][0] is Code.UNSUPPORTED
    assert problems(olmo2, backend="vllm") == []
    ((code, _, cause),) = problems(read_config(pico("qwen2", name="qwen2")), backend="vllm")
    assert code is Code.UNSUPPORTED
    assert cause.startswith("vLLM")
    llama = read_config(pico(name="llama"))
    ((code, where, cause),) = problems(llama, backend="vllm", quantize="int8_sq")
    assert (code, where) == (Code.UNSUPPORTED, "export.quantize")
    assert cause == "vLLM (0.32) reads no int8_sq"


def test_a_model_without_a_tokenizer_cannot_be_served(pico: PicoMaker, tmp_path: Path) -> None:
    source = pico()
    (source / "tokenizer.json").unlink()
    with pytest.raises(ParetronError, match=r"no tokenizer\.json") as caught:
        export(source, tmp_path / "out", backend="vllm")
    assert caught.value.problems[0].code is Code.INPUT_TOKENIZER


def test_E1_without_tritonclient_it_says_what_to_install(  # noqa: N802
    pico: PicoMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_lint, "FLOORS", {"tritonclient": "2.60"})
    import paretron_exporters.triton as module
    from paretron import versions

    monkeypatch.setattr(module, "FLOORS", {"tritonclient": "2.60"})
    monkeypatch.setattr(versions, "installed", lambda name: None)
    found = EXPORTER.problems(
        read_config(pico()), export=Export.model_validate({"to": "triton", "backend": "vllm"})
    )
    assert [(p.code.exit, p.fix) for p in found] == [(6, 'pip install "paretron[triton]"')]
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
    with pytest.raises(ParetronError) as caught:
        read_pbtxt("")
    assert caught.value.exit_code == 6
    assert caught.value.problems[0].fix == 'pip install "paretron[triton]"'


def test_it_is_found_by_name_and_plans_without_torch() -> None:
    assert find_plugin(EXPORTERS, "triton", where="--to").name == "triton"
    code = "import sys, paretron_exporters.triton; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    assert (hf.EXPORTER.name, onnx.EXPORTER.name) == ("hf", "onnx")


def test_the_client_of_trtllm_prints_a_growing_text_once(made: Any) -> None:
    """Its stream repeats what it said; what it is asked is what its config.pbtxt takes."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()
            for text in ("one", "one two", "one two three"):
                self.wfile.write(f"data: {json.dumps({'text_output': text})}\n\n".encode())

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    repository = made("trtllm")
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        done = subprocess.run(
            [sys.executable, str(repository / "client_http.py"), "zero", "--stream",
             "--url", f"http://127.0.0.1:{server.server_port}"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "one two three\n")
    config = read_pbtxt((repository / "tensorrt_llm/config.pbtxt").read_text())
    assert {"text_input", *asked[0]["parameters"]} <= {i.name for i in config.input}


def test_files_for_a_repository_are_clean_python(made: Any) -> None:
    """They are no modules here, so the linters would not see them."""
    repository = made("onnx")
    files = [repository / "llm/1/model.py", *repository.glob("client_*.py")]
    files += list(made("trtllm").glob("client_*.py"))
    assert len(files) == 5
    config = Path(__file__).parents[2] / "pyproject.toml"
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--no-cache", "--config", str(config), *files],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
