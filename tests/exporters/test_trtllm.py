"""What `trtllm` adds to a checkpoint: settings that read back, and commands that say all."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from paretron.artifacts.manifest import Provenance, verify
from paretron.artifacts.reader import Checkpoint
from paretron.errors import Code, ParetronError
from paretron.evaluate.parity import ParityReport
from paretron.recipe import Export
from paretron_exporters import trtllm
from paretron_exporters.trtllm import EXPORTER
from trtllmcases import tensors_of

PicoMaker = Callable[..., Path]


def run(source: Path, out: Path, **section: Any) -> ParityReport:
    return EXPORTER.export(
        source,
        export=Export.model_validate({"to": "trtllm"} | section),
        out=out,
        provenance=Provenance(kind="export", parents={"model": "0" * 64}, stamp="TEST"),
        on_event=lambda kind, fields: None,
    )


@pytest.fixture(scope="module")
def made(_pico_cache: PicoMaker, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source and its export for two devices."""
    source, out = _pico_cache("llama", num_hidden_layers=2), tmp_path_factory.mktemp("trt") / "out"
    serving = {"max_batch_size": 8, "max_num_tokens": 512, "max_seq_len": 256, "gpu_memory": 0.7}
    report = run(source, out, tensor_parallel=2, serving=serving)
    assert report.passed
    assert [c.level for c in report.checks] == ["L0", "L1", "L2", "L3", "L4"]
    return source, out


def test_the_checkpoint_is_the_source(made: tuple[Path, Path]) -> None:
    source, out = made
    verify(out)
    verify(out / "model")
    before, after = tensors_of(source), tensors_of(out / "model")
    assert before.keys() == after.keys()
    assert all(after[name].equal(before[name]) for name in before)
    config = json.loads((out / "model" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]


def test_settings_are_those_of_the_recipe(made: tuple[Path, Path]) -> None:
    text = (made[1] / "llm_config.yaml").read_text()
    assert YAML(typ="safe", pure=True).load(text) == {
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 1,
        "max_batch_size": 8,
        "max_num_tokens": 512,
        "max_seq_len": 256,
        "kv_cache_config": {"free_gpu_memory_fraction": 0.7, "dtype": "auto"},
        "cuda_graph_config": {"enable_padding": True},
    }


def called(script: Path, folder: Path) -> list[list[str]]:
    """What a script calls, by programs of those names that only note their arguments."""
    folder.mkdir()
    for name in ("trtllm-serve", "trtllm-bench"):
        program = folder / name
        program.write_text(
            f'#!/bin/sh\n{{ echo {name} "$(pwd)"; printf "%s\\n" "$@"; echo END; }}'
            f" >> {folder}/log\n"
        )
        program.chmod(0o755)
    environment = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "TMPDIR": str(folder)}
    subprocess.run([str(script), "--port", "9"], check=True, cwd="/", env=environment)
    calls = (folder / "log").read_text().split("END\n")[:-1]
    return [call.split() for call in calls]


def test_the_server_is_started_with_its_settings(made: tuple[Path, Path], tmp_path: Path) -> None:
    (call,) = called(made[1] / "serve.sh", tmp_path / "bin")
    assert call == [
        "trtllm-serve", str(made[1]), "model", "--config", "llm_config.yaml", "--port", "9",
    ]  # fmt: skip


def test_the_benchmark_makes_its_requests_first(made: tuple[Path, Path], tmp_path: Path) -> None:
    prepare, measure = called(made[1] / "bench.sh", tmp_path / "bin")
    requests = str(tmp_path / "bin" / "paretron-bench.jsonl")
    start = ["trtllm-bench", str(made[1]), "--model", "model", "--model_path", "model"]
    assert prepare[: len(start) + 4] == [
        *start, "prepare-dataset", "--output", requests, "token-norm-dist",
    ]  # fmt: skip
    assert measure == [
        *start, "throughput", "--backend", "pytorch", "--dataset", requests, "--config",
        "llm_config.yaml", "--streaming", "--report_json",
        str(tmp_path / "bin" / "paretron-bench.json"), "--port", "9",
    ]  # fmt: skip


def test_settings_that_read_back_otherwise_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trtllm.YAML, "load", lambda self, text: {"max_batch_size": "1"})
    with pytest.raises(ParetronError) as caught:
        trtllm.write_settings(tmp_path / "llm_config.yaml", {"max_batch_size": 1})
    assert caught.value.problems[0].code is Code.GATE_RELOAD


def test_a_model_without_a_tokenizer_serves_nobody(pico: PicoMaker, tmp_path: Path) -> None:
    source = pico("llama", num_hidden_layers=2)
    (source / "tokenizer.json").unlink()
    with pytest.raises(ParetronError) as caught:
        run(source, tmp_path / "out")
    assert caught.value.problems[0].code is Code.INPUT_TOKENIZER


@pytest.mark.parametrize(
    ("family", "section", "code", "said"),
    [
        ("llama", {"tensor_parallel": 3}, Code.RECIPE_VALUE, "heads is 4"),
        ("llama", {"pipeline_parallel": 5}, Code.RECIPE_VALUE, "4 layers"),
        ("starcoder2", {}, Code.UNSUPPORTED, "no starcoder2"),
        ("llama", {"quantize": "int8_sq"}, Code.UNSUPPORTED, "int8_sq"),
        ("llama", {"device": "cuda"}, Code.UNSUPPORTED, "device"),
        ("llama", {"build": True}, Code.UNSUPPORTED, "build"),
        ("llama", {"serving": {"max_seq_len": 1024}}, Code.RECIPE_VALUE, "512 positions"),
        ("llama", {"serving": {"max_num_tokens": 8}}, Code.RECIPE_VALUE, "8 tokens a step"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_told_at_plan_time(
    family: str, section: Mapping[str, Any], code: Code, said: str, pico: PicoMaker
) -> None:
    config = Checkpoint.open(pico(family)).config
    export = Export.model_validate({"to": "trtllm"} | dict(section))
    found = [p for p in EXPORTER.problems(config, export=export) if said in p.cause]
    assert [p.code for p in found] == [code]


def test_an_axis_that_is_not_shared_is_named(pico: PicoMaker) -> None:
    """Vocabulary, MLP and heads are each a problem of their own."""
    config = Checkpoint.open(pico("llama")).config | {"vocab_size": 321, "intermediate_size": 97}
    export = Export(to="trtllm", tensor_parallel=2)
    problems = EXPORTER.problems(config, export=export)
    assert [p.cause.split(",")[0] for p in problems] == ["ffn is 97", "vocab is 321"]
    assert {(p.code, p.code.exit) for p in problems} == {(Code.RECIPE_VALUE, 2)}
