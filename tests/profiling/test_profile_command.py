"""`paretron profile`: several engines in one command, each with the form that it runs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from paretron.cli.main import main
from paretron.run import measure as stage
from paretron_profiling.models import ModelUnderTest
from paretron_profiling.result import ProfileResult


def profiled(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["profile", *map(str, arguments)])
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


def test_two_engines_in_one_command(
    models: list[ModelUnderTest], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    named = [f"{m.name}={m.folders['onnx']},{m.folders['hf']}" for m in models[:2]]
    code, out, err = profiled(
        capsys, *named, "--engine", "ortgenai", "--engine", "transformers", "--batch", "1",
        "--batch", "2", "--input-len", "8", "--output-len", "4", "--repeats", "1", "--json",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, err
    content: dict[str, Any] = json.loads(out)
    result = ProfileResult.from_json(content)
    assert set(result.engines) == {"ortgenai", "transformers"}
    for found in result.measurements.values():
        assert {(m.engine, m.load) for m in found} >= {
            ("ortgenai", 1), ("ortgenai", 2), ("transformers", 1), ("transformers", 2),
        }  # fmt: skip
    assert {s.engine for s in result.speedups} == {"ortgenai", "transformers"}
    assert {p.work.engine for p in result.memory} == {"ortgenai", "transformers"}
    # The machine itself was probed, and the bounds that follow stand beside what was measured.
    assert content["device"]["kind"] == "cpu"
    rows = {(r["model"], r["engine"]) for r in content["roofline"]["rows"]}
    assert rows == {(m.name, e) for m in models[:2] for e in ("ortgenai", "transformers")}
    # Facts are of the checkpoint, which lies second here.
    parents = json.loads((tmp_path / "out/manifest.json").read_text())["parents"]
    assert set(parents) == {f"{m.name}.{form}" for m in models[:2] for form in ("hf", "onnx")}


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--engine", "vllm="], "'vllm=' is no engine"),
        (["--engine", "ortgenai", "--engine", "ortgenai"], "named before"),
        (["--engine", "ort genai"], "profile.engines.0.name"),
        (["--engine", "ortgenai", "--server", "teacher=http://x"], "with --engine openai"),
        (["--engine", "openai", "--server", "teacher=ftp://x"], "profile.engines.0.servers"),
        (["--engine", "openai", "--server", "http://x"], "by the name of a model"),
        (["--engine", "openai", "--server", "student=http://x"], "no server is named"),
        (["--engine", "openai", "--server", "student=http://x"], "is no model called student"),
        (["--rate", "0"], "profile.rates.0"),
        (["--concurrency", "4"], "ortgenai cannot be put under such a load"),
        (["--engine", "nothing"], "no engine is called 'nothing'"),
    ],
)
def test_what_cannot_be_profiled(
    arguments: list[str], cause: str, teacher: ModelUnderTest, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    named = f"teacher={teacher.folders['onnx']},{teacher.folders['hf']}"
    code, _, err = profiled(capsys, named, *arguments, "--out", tmp_path / "out")
    assert code == 2, err
    assert cause in err
    assert list(tmp_path.iterdir()) == []


def test_what_is_refused_before_anything_is_measured(
    teacher: ModelUnderTest, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(stage, "profile_models", lambda *_, **__: pytest.fail("it was measured"))
    named = f"teacher={teacher.folders['onnx']},{teacher.folders['hf']}"
    (tmp_path / "there").mkdir()
    code, _, err = profiled(capsys, named, "--out", tmp_path / "there")
    assert (code, "already exists" in err) == (2, True), err
    code, _, err = profiled(capsys, named, named, "--out", tmp_path / "out")
    assert (code, "the model teacher is named twice" in err) == (2, True), err


def test_a_form_that_is_not_there(
    teacher: ModelUnderTest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = f"teacher={teacher.folders['onnx']}"
    code, _, err = profiled(capsys, named, "--engine", "transformers", "--out", tmp_path / "out")
    assert code == 2, err
    assert "transformers runs a checkpoint, and teacher has none" in err


def test_a_quantised_checkpoint_counts_as_its_files_do(
    teacher: ModelUnderTest, tmp_path: Path
) -> None:
    folder = tmp_path / "quantised"
    shutil.copytree(teacher.folders["hf"], folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"0" * 1000)  # of less than the shapes say
    assert stage.facts_of(folder) == replace(teacher.facts, weight_bytes=1000)


def test_two_folders_of_one_form(
    teacher: ModelUnderTest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = f"teacher={teacher.folders['onnx']},{teacher.folders['onnx']}"
    code, _, err = profiled(capsys, named, "--out", tmp_path / "out")
    assert code == 2, err
    assert "teacher has two folders of one form" in err
