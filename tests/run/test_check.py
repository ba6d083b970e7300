"""The rehearsal: same code as a run, on a twin, stamped TEST; the last gate fails first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from paretron.artifacts.writer import TensorWriter
from paretron.cli.main import _run
from paretron.families import FAMILIES, explicit, family_of, sizes
from paretron.recipe import Profile, Student
from paretron.run.check import _little_profile, twin_config, twin_student
from picorun import paretron, write_pico_recipe

LLAMA_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "num_hidden_layers": 32,
    "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128,
}  # fmt: skip


def test_check_runs_every_stage_and_stamps_it(tmp_path: Path) -> None:
    recipe = write_pico_recipe(tmp_path)
    out = tmp_path / "kept"
    done = paretron("check", recipe, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    stages = json.loads(done.stdout)["stages"]
    assert {"correct", "score", "width.export-onnx", "profile", "report"} <= set(stages)
    for stage in (out / "stages").glob("[!.]*"):
        assert json.loads((stage / "manifest.json").read_text())["stamp"] == "TEST"
    report = json.loads((out / "report/report.json").read_text())
    assert report["stamp"] == "TEST"
    assert "TEST" in (out / "report/report.html").read_text()
    config = json.loads((out / "stages/correct/config.json").read_text())
    assert config["num_hidden_layers"] == 2


def test_check_fails_with_the_gate_that_a_broken_tensor_trips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_pico_recipe(tmp_path)
    write = TensorWriter.write

    def break_one(self: TensorWriter, name: str, tensor: torch.Tensor) -> None:
        inside_export = "export-hf" in str(self._folder)
        broken = inside_export and name == "model.layers.0.mlp.down_proj.weight"
        write(self, name, tensor + 1e-2 if broken else tensor)

    monkeypatch.setattr(TensorWriter, "write", break_one)
    assert _run(["check", str(recipe), "-q"]) == 5
    said = capsys.readouterr().err
    assert "model.layers.0.mlp.down_proj.weight" in said


def test_twin_shrinks_what_the_recipe_shrinks() -> None:
    config = twin_config(LLAMA_8B)
    family = family_of(LLAMA_8B)
    real, tiny = sizes(family, LLAMA_8B), sizes(family, config)
    assert (tiny["layers"], tiny["head_dim"], tiny["vocab"]) == (2, 128, 128256)
    student = twin_student(Student(hidden=3072, ffn=9216), real=real, tiny=tiny)
    assert student == Student(hidden=96, ffn=288)
    assert twin_student(Student(layers=16), real=real, tiny=tiny) == Student(layers=1)
    assert twin_student(Student(heads=16), real=real, tiny=tiny) == Student(heads=2)
    assert twin_student(Student(kv_heads=4), real=real, tiny=tiny).kv_heads == 1


def test_the_twin_is_profiled_lightly() -> None:
    def little(*engines: dict[str, Any], **loads: Any) -> Profile | None:
        settings = {"engines": engines, "batches": [8], "min_seconds": 60} | loads
        return _little_profile(Profile.model_validate(settings))

    alone = {"name": "openai", "servers": {"teacher": "http://127.0.0.1:8000"}}
    loops = {"concurrency": [64, 128], "rates": [0.5]}
    found = little({"name": "vllm_server"}, **loops)
    assert found is not None
    assert found.loads == {"offline": (1,), "closed": (2,), "open": (8.0,)}
    assert (found.requests_of("closed", 2), found.min_seconds, found.repeats) == (4, 0.0, 1)
    assert little(alone, **loops) is None
    left = little({"name": "ortgenai"}, alone, batches=[], **loops)
    assert left is not None
    assert left.loads == {"offline": (1,)}
    assert [e.name for e in left.engines] == ["ortgenai"]


def test_every_family_has_a_twin() -> None:
    for name, family in FAMILIES.items():
        experts = {"num_experts": 8, "moe_intermediate_size": 1536, "num_experts_per_tok": 2}
        config = LLAMA_8B | {"model_type": name, "layer_types": ["full_attention"] * 32}
        tiny = twin_config(explicit(family, config | experts))
        assert len(tiny["layer_types"]) == 2
        assert sizes(family, tiny)["q_per_kv"] == 2
        assert sizes(family, tiny).get("experts", 4) == 4


def test_problems_of_the_recipe_come_before_any_work(tmp_path: Path) -> None:
    recipe = write_pico_recipe(tmp_path, students={"width": {"hidden": 4096}})
    done = paretron("check", recipe)
    assert done.returncode == 2
    assert "students.width.hidden" in done.stderr
