"""The command line as a user meets it: verbs on folders, JSON, exit codes, errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from conftest import PicoMaker
from paretron.artifacts.manifest import verify
from paretron.artifacts.models import load_model
from picorun import paretron, write_pico_recipe


def test_verbs_one_by_one(tmp_path: Path) -> None:
    """What `run` does, by hand: each verb's output is the next one's input."""
    recipe = write_pico_recipe(tmp_path, profile=None, export=[{"to": "hf"}])
    teacher, settings = tmp_path / "teacher", ("--recipe", recipe, "-q")

    def ok(*arguments: str | Path) -> str:
        done = paretron(*arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    ok("correct", teacher, *settings, "--out", "corrected")
    ok("score", "corrected", *settings, "--out", "scores")
    ok("prune", "corrected", "--scores", "scores", "--hidden", "48", "--ffn", "64", "--out", "cut",
       "-q")  # fmt: skip
    ok("distill", "cut", "--teacher", "corrected", *settings, "--out", "student")
    said = json.loads(ok("eval", "student", *settings, "--out", "numbers", "--json"))
    numbers = said["texts"]["validation"]
    assert numbers["tokens"] > 0
    assert numbers["perplexity"] > 1
    ok("export", "student", "--to", "hf", "--out", "served", "-q")
    found = json.loads(ok("inspect", "served", "--json"))
    assert (found["sizes"]["hidden"], found["sizes"]["ffn"]) == (48, 64)
    # 48 channels over 4 heads divide, so the name stays; the relabelled case has its own test.
    assert found["family"] == "llama"
    assert load_model(tmp_path / "served").config.head_dim == 32
    for made in ("corrected", "scores", "cut", "student", "numbers", "served"):
        verify(tmp_path / made)
    assert not list(tmp_path.glob(".*state"))


def test_existing_out_is_refused_and_replaced_on_request(pico: PicoMaker, tmp_path: Path) -> None:
    model, out = pico(), tmp_path / "out"
    command = ("export", model, "--to", "hf", "--out", out, "-q")
    assert paretron(*command).returncode == 0
    before = (out / "manifest.json").read_bytes()
    refused = paretron(*command)
    assert refused.returncode == 2
    assert "--overwrite" in refused.stderr
    assert (out / "manifest.json").read_bytes() == before
    assert paretron(*command, "--overwrite").returncode == 0
    verify(out)


@pytest.mark.parametrize("place", ["model", "model/inside", "."])
def test_out_may_not_touch_the_input(place: str, pico: PicoMaker, tmp_path: Path) -> None:
    model = pico()
    before = {p.name: p.read_bytes() for p in model.iterdir()}
    done = paretron("export", model, "--to", "hf", "--out", tmp_path / place, "--overwrite")
    assert done.returncode == 2
    assert "overlaps" in done.stderr
    assert {p.name: p.read_bytes() for p in model.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["frobnicate"], 2, "No such command"),
        (["paln"], 2, "plan"),
        (["plan", "absent.yaml"], 2, "no such file"),
        (["plan", "r.yaml", "--nonsense"], 2, "--nonsense"),
        (["inspect", "absent"], 3, "no such folder"),
        (["verify", "."], 3, "manifest.json"),
        (["recipes", "show", "absent"], 2, "quickstart"),
        (["export", "model", "--to", "htf", "--out", "o"], 2, "did you mean hf?"),
        (["export", "model", "--to", "hf", "--dtype", "int3", "--out", "o"], 2, "float32"),
        (["export", "model", "--to", "hf", "--recipe", "r", "--out", "o"], 2, "--quantize FORM"),
        (["prune", "model", "--scores", "s", "--out", "o"], 2, "--hidden"),
        (["prune", "model", "--scores", "s", "--hidden", "9999", "--out", "o"], 2, "at most 64"),
        (["prune", "model", "--scores", "s", "--hidden", "48", "--out", "o"], 3, "paretron score"),
        (["report", "."], 3, "finished"),
    ],
)
def test_errors_name_cause_and_next_step(
    arguments: list[str], code: int, said: str, pico: PicoMaker, tmp_path: Path
) -> None:
    pico()
    done = paretron(*arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("arguments", [[], ["recipes"]])
def test_no_verb_is_answered_with_the_help(arguments: list[str]) -> None:
    done = paretron(*arguments)
    assert done.returncode == 2
    assert "Usage: paretron" in done.stdout + done.stderr
    assert "error:" not in done.stderr


def test_an_impossible_size_is_said_of_its_option(pico: PicoMaker, tmp_path: Path) -> None:
    command = ("prune", pico(), "--scores", tmp_path, "--out", tmp_path / "out")
    assert paretron(*command, "--kv-heads", "9").stderr.startswith("error: --kv-heads: 9 is more")


def test_problems_as_json(tmp_path: Path) -> None:
    done = paretron("inspect", tmp_path, "--json")
    assert done.returncode == 3
    (problem,) = json.loads(done.stdout)["problems"]
    assert problem["code"] == "input.missing"
    assert set(problem) == {"code", "cause", "where", "fix"}


def test_recipes_are_listed_copied_and_valid(tmp_path: Path) -> None:
    listed = json.loads(paretron("recipes", "ls", "--json").stdout)
    assert {"quickstart", "llama-3.1-8b"} <= set(listed)
    assert all(headline for headline in listed.values())
    for name in listed:
        assert paretron("recipes", "cp", name, tmp_path / f"{name}.yaml").returncode == 0
    done = paretron("recipes", "validate", *sorted(tmp_path.glob("*.yaml")))
    assert done.returncode == 0, done.stderr


def test_doctor_tells_what_is_here() -> None:
    done = paretron("doctor", "--json")
    assert done.returncode == 0
    found = json.loads(done.stdout)
    assert {"hf", "onnx"} <= set(found["exporters"])
    assert {"ortgenai", "vllm", "transformers"} <= set(found["engines"])
    assert found["packages"]["torch"]


def test_an_offline_hub_id_is_said_at_once(tmp_path: Path) -> None:
    recipe = write_pico_recipe(tmp_path, teacher={"model": "nobody/nothing-8b"})
    shutil.rmtree(tmp_path / "teacher")
    done = paretron("plan", recipe, "--offline")
    assert done.returncode == 3
    assert "nobody/nothing-8b" in done.stderr
