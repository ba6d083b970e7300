"""What `plan` says without weights: published counts, every problem at once."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from paretron.plan.plan import engine_problems
from paretron.recipe import Recipe
from picorun import RECIPE
from published import PUBLISHED, Published, recipe_text

SHAPES = {shape.name: shape for shape in PUBLISHED}


def run_plan(folder: Path, recipe: str) -> tuple[int, dict[str, Any], float]:
    (folder / "recipe.yaml").write_text(recipe)
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "paretron", "plan", "recipe.yaml", "--json", "--offline"],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, json.loads(done.stdout), time.perf_counter() - start


@pytest.mark.parametrize("name", SHAPES)
def test_published_counts_from_config_alone(name: str, tmp_path: Path) -> None:
    shape = SHAPES[name]
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "config.json").write_text(json.dumps(shape.config))
    code, found, _ = run_plan(tmp_path, recipe_text(shape))
    facts = found["teacher"] if shape.student is None else found["students"]["student"]
    assert shape.rounded(facts["params"], shape.total) == shape.total
    assert shape.rounded(facts["non_embedding_params"], shape.non_embedding) == shape.non_embedding
    # A teacher without weights cannot be run, and that is said beside the counts.
    assert code == 3
    assert "input.missing" in {p["code"] for p in found["problems"]}


def plan_of(tmp_path: Path, students: str, more: str = "") -> tuple[int, list[dict[str, str]]]:
    shape = SHAPES["Llama-3.1-8B"]
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "config.json").write_text(json.dumps(shape.config))
    code, found, _ = run_plan(tmp_path, recipe_text(shape, students=students) + more)
    return code, found["problems"]


@pytest.mark.parametrize(
    ("target", "key", "fix"),
    [
        ("{hidden: 8192}", "hidden", "at most 4096"),
        ("{layers: 33}", "layers", "at most 32"),
        ("{heads: 20}", "heads", "16 or 24"),
        ("{heads: 32, kv_heads: 4}", "heads", "at most 16"),
        ("{layers: 32}", "", "smaller"),
    ],
)
def test_impossible_targets_name_the_nearest(
    target: str, key: str, fix: str, tmp_path: Path
) -> None:
    code, problems = plan_of(tmp_path, f"{{a: {target}}}")
    own = [p for p in problems if p["code"] == "recipe.target"]
    assert code == 2
    assert [p["where"] for p in own] == ["students.a" + (f".{key}" if key else "")]
    assert fix in own[0]["fix"]


def test_every_problem_at_once(tmp_path: Path) -> None:
    code, problems = plan_of(
        tmp_path,
        "{a: {hidden: 9999}, b: {layers: 99}}",
        "export: [{to: nowhere}]\nprofile: {engines: [{name: nothing}]}\n",
    )
    assert code == 2
    assert {p["where"] for p in problems} >= {
        "students.a.hidden",
        "students.b.layers",
        "export.0.to",
        "profile.engines.0.name",
    }
    assert {p["code"] for p in problems} >= {"recipe.target", "recipe.value", "input.missing"}


def test_loads_that_no_engine_takes(tmp_path: Path) -> None:
    """An engine that is no server leaves loops to one that is; without one they are a problem."""
    served = "{name: openai, servers: {teacher: 'http://127.0.0.1:80', a: 'http://127.0.0.1:81'}}"
    for engines, expected in (
        ("{name: transformers}", {"profile.concurrency", "profile.engines"}),
        (f"{{name: transformers}}, {served}", {"profile.engines"}),
        (served, set()),
    ):
        folder = tmp_path / str(len(engines))
        folder.mkdir()
        _, problems = plan_of(
            folder,
            "{a: {layers: 8}}",
            f"profile: {{engines: [{engines}], batches: [], concurrency: [8]}}\n",
        )
        found = [p for p in problems if p["where"].startswith("profile.")]
        assert {p["where"] for p in found} == expected, found
        assert all("server" in p["fix"] for p in found if p["where"] == "profile.concurrency")
        assert all("transformers" in p["cause"] for p in found)


def test_servers_and_ports_go_by_the_names_of_the_models(tmp_path: Path) -> None:
    """Said when planning: the profile comes hours after the first stage."""
    engine = "{name: openai, servers: {teacher: 'http://127.0.0.1:80', b: 'http://x'}}"
    _, problems = plan_of(tmp_path, "{a: {layers: 8}}", f"profile: {{engines: [{engine}]}}\n")
    found = {p["cause"] for p in problems if p["where"] == "profile.engines: openai: servers"}
    assert found == {"no server is named for the model a", "there is no model called b"}


def test_plan_reads_no_torch_and_is_quick(tmp_path: Path) -> None:
    shape = SHAPES["Llama-3.1-8B"]
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(shape.config))
    (tmp_path / "recipe.yaml").write_text(recipe_text(shape))
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from paretron.recipe import load_recipe\n"
        "from paretron.plan.plan import make_plan\n"
        "made = make_plan(load_recipe(Path('recipe.yaml')), out=Path('out'), offline=True)\n"
        "assert made.students\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)


def test_published_names_are_distinct() -> None:
    assert len(SHAPES) == 8
    assert all(isinstance(shape, Published) for shape in PUBLISHED)


def test_a_loss_that_the_models_cannot_have(tmp_path: Path) -> None:
    shape = SHAPES["Llama-3.1-8B"]
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "config.json").write_text(json.dumps(shape.config))
    loss = "{top_k: 128256, states: {output: [[31, 15], [32, 0]], attention: [[0, 16]]}}"
    text = recipe_text(shape, students="{a: {layers: 16}, b: {layers: 20}}")
    _, found, _ = run_plan(tmp_path, text.replace("distill: {", f"distill: {{loss: {loss}, "))
    told = [(p["where"], p["cause"], p["fix"]) for p in found["problems"]]
    assert sorted(t for t in told if t[0].startswith("distill.loss")) == [
        ("distill.loss.states.attention", "[0, 16] of 32 and 16 layers",
         "at most [31, 15]: layers count from 0"),
        ("distill.loss.states.output", "[32, 0] of 32 and 16 layers",
         "at most [31, 15]: layers count from 0"),
        ("distill.loss.states.output", "[32, 0] of 32 and 20 layers",
         "at most [31, 19]: layers count from 0"),
        ("distill.loss.top_k", "128256 of a vocabulary of 128256 tokens",
         "at most 128255, or leave it out"),
    ]  # fmt: skip


def test_an_engine_does_not_run_another_form_of_its_export() -> None:
    """A quantised graph has a stage and a label of its own, and no engine asks for those."""
    recipe = Recipe.model_validate(RECIPE | {"export": [{"to": "onnx", "quantize": "int8"}]})
    (problem,) = engine_problems(recipe)[0]
    assert "runs the onnx export, which the recipe lacks" in problem.cause
    assert problem.fix == "add {to: onnx} to export"
    assert engine_problems(Recipe.model_validate(RECIPE))[0] == []
