"""Group R: what can be wrong with a recipe or a command line.

A row is a change of a good recipe, or a command line; add one to the table of its kind.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from faults.conftest import CANARY, Cli, Refused, run_and_measure
from makers import PicoMaker
from paretron.artifacts.config import read_config
from paretron.errors import Code
from paretron.recipe import load_recipe

TREE = Path(__file__).parents[2]
RECIPE = """\
schema: 1
teacher: {model: ./model}
data:
  calibration: {corpus: stdlib, part: calibration, seq_len: 64}
  train: {corpus: stdlib, part: train, seq_len: 64}
  validation: {corpus: stdlib, part: validation, seq_len: 64}
students:
  width: {hidden: 48}
distill:
  tokens: 1.0e5
  global_batch: 8
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


# id -> what is appended to the recipe, the code, and what the message must name
BROKEN: dict[str, tuple[str, Code, tuple[str, ...]]] = {
    "R1": (
        "  loss: {temprature: 1}\nscore: {dept: {metric: bi}}\n",
        Code.RECIPE_UNKNOWN_KEY,
        ("distill.loss.temprature", "did you mean temperature?", "score.dept", "mean depth?"),
    ),
    "R2-type": ("  lr: fast\n", Code.RECIPE_VALUE, ("distill.lr", "a number", "'fast'")),
    "R2-range": ("  lr: 2.0\n", Code.RECIPE_VALUE, ("distill.lr", "less than 1", "2.0")),
    "R2-nan": ("  lr: .nan\n", Code.RECIPE_VALUE, ("distill.lr", "finite", "nan")),
    "R2-negative": ("  lr: -1\n", Code.RECIPE_VALUE, ("distill.lr", "greater than 0", "-1")),
    "R3": (
        "x: !!python/object/apply:os.system ['touch canary']\n",
        Code.RECIPE_SYNTAX,
        ("python/object",),
    ),
    "R4-aliases": (
        "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
        + "".join(
            f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n"
            for a, b in zip("abcdefgh", "bcdefghi", strict=True)
        ),
        Code.RECIPE_SYNTAX,
        ("aliases",),
    ),
    "R4-depth": (f"x: {'[' * 20_000}\n", Code.RECIPE_SYNTAX, ("nested deeper",)),
    "R4-size": ("#" * (50 << 20), Code.RECIPE_SYNTAX, ("not a recipe",)),
    "R5": ("  global_batch: 4\n", Code.RECIPE_SYNTAX, ('"global_batch" stands twice',)),
    "R10-target": ("  _target_: os.system\n", Code.RECIPE_UNKNOWN_KEY, ("_target_",)),
    "R10-component": ("  _component_: os.system\n", Code.RECIPE_UNKNOWN_KEY, ("_component_",)),
    "R10-interpolation": ("seed: ${env:HOME}\n", Code.RECIPE_VALUE, ("${env:HOME}",)),
    "R11-value": (f"seed: {CANARY}\n", Code.RECIPE_VALUE, ("seed", "hf_***")),
    "R11-key": (f"{CANARY}: 1\n", Code.RECIPE_UNKNOWN_KEY, ("hf_***",)),
    "R11-not-a-token": ("num_memory_tokens: 1\n", Code.RECIPE_UNKNOWN_KEY, ("num_memory_tokens",)),
}


@pytest.mark.parametrize("verb", ["recipes validate", "plan"])
@pytest.mark.parametrize("id", BROKEN)
def test_a_broken_recipe_is_refused(
    id: str, verb: str, recipe: Path, refused: Refused, tmp_path: Path
) -> None:
    text, code, names = BROKEN[id]
    recipe.write_text(RECIPE + text)
    start = time.monotonic()
    refused(*verb.split(), recipe, code=code, names=(str(recipe), *names))
    assert time.monotonic() - start < 5
    assert not (tmp_path / "canary").exists()


def test_r4_in_little_time_and_memory(recipe: Path) -> None:
    text, code, _ = BROKEN["R4-aliases"]
    recipe.write_text(RECIPE + text)
    exit_code, peak_kb, heavy = run_and_measure("plan", recipe)
    assert (exit_code, heavy) == (code.exit, [])
    assert peak_kb < 300_000


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("prune: {merge_heads: false}\n", "prune.merge_heads", False),
        ("score: {depth: {contiguous: false}}\n", "score.depth.contiguous", False),
        ("  warmup_steps: 0\n", "distill.warmup_steps", 0),
        ("correct: null\n", "correct", None),
    ],
)
def test_r6_an_explicit_false(text: str, key: str, value: object, recipe: Path) -> None:
    recipe.write_text(RECIPE + text)
    found = load_recipe(recipe).model_dump()
    for part in key.split("."):
        found = found[part]
    assert found is value or (found == value and type(found) is type(value))


def test_r7_three_ways_to_say_one_thing(recipe: Path, cli: Cli, pico: PicoMaker) -> None:
    pico()
    sets = ["--set", "distill.lr=1e-4", "--set", "seed=0"]
    ways = [
        ["plan", recipe, "--json"],
        ["plan", recipe, *sets, "--json"],
        ["plan", "--json", *sets[2:], *sets[:2], recipe],
        ["plan", "--set=seed=0", recipe, "--json"],
    ]
    recipes = [load_recipe(recipe), load_recipe(recipe, overrides=sets[1::2])]
    students = [json.loads(cli(*way).out)["students"] for way in ways]
    recipe.write_text(RECIPE + "  lr: 0.0001\nseed: 0\n")
    recipes.append(load_recipe(recipe))
    assert all(r == recipes[0] for r in recipes)
    assert all(s == students[0] for s in students)


COMMANDS = {
    "verb": (["plann", "x.yaml"], "plan"),
    "flag": (["plan", "x.yaml", "--ofline"], "--offline"),
    "set-key": (["plan", "recipe.yaml", "--set", "distill.lrr=1"], "did you mean lr?"),
}


@pytest.mark.parametrize("id", COMMANDS)
def test_r8_a_command_that_is_none(id: str, recipe: Path, refused: Refused) -> None:
    arguments, suggests = COMMANDS[id]
    outcome = refused(*arguments, code=Code.USAGE)
    assert suggests in outcome.err


@pytest.mark.parametrize("id", COMMANDS)
def test_r8_answers_at_once(id: str, recipe: Path) -> None:
    arguments = [str(recipe) if a == "recipe.yaml" else a for a in COMMANDS[id][0]]
    exit_code, _, heavy = run_and_measure(*arguments)
    assert (exit_code, heavy) == (2, [])


@pytest.mark.parametrize("verb", ["plan", "inspect", "verify"])
def test_r8_a_path_that_the_system_refuses(verb: str, refused: Refused, tmp_path: Path) -> None:
    refused(verb, tmp_path / ("x" * 300), code=Code.USAGE, names="x" * 80)


# id -> the student, and what the message must say besides its key
TARGETS = {
    "larger": ("{hidden: 65}", "at most 64"),
    "more-layers": ("{layers: 5}", "at most 4"),
    "more-heads": ("{heads: 8}", "at most 4"),
    "heads-over-groups": ("{heads: 3}", "nearest: 2 or 4"),
    "same": ("{hidden: 64}", "the same shape"),
    "no-layers": ("{layers: 0}", "greater than 0"),
    "negative": ("{ffn: -8}", "greater than 0"),
    "fraction": ("{hidden: 0.75}", "fractional part"),
}


@pytest.mark.parametrize("id", TARGETS)
def test_r12_an_impossible_target(id: str, recipe: Path, refused: Refused, pico: PicoMaker) -> None:
    pico()
    student, says = TARGETS[id]
    recipe.write_text(RECIPE.replace("{hidden: 48}", student))
    refused("plan", recipe, code=Code.RECIPE_TARGET, names=("students.width", says))


def test_r12_what_llama_refuses_with_biases(
    recipe: Path, refused: Refused, cli: Cli, pico: PicoMaker
) -> None:
    """hidden % heads: the Mistral name is the way out, unless there are biases."""
    recipe.write_text(RECIPE.replace("{hidden: 48}", "{hidden: 50}"))
    pico()
    assert cli("plan", recipe).code == 0
    pico("llama", name="biased", attention_bias=True)
    recipe.write_text(recipe.read_text().replace("./model", "./biased"))
    refused("plan", recipe, code=Code.RECIPE_TARGET, names="nearest: 48 or 52")


# R14: every shipped recipe is found, read, and planned where its teacher is known.

SHIPPED = sorted(TREE.glob("recipes/**/*.yaml"))
# Teachers that are not on this machine: the config of the published model stands in.
PUBLISHED = {
    "llama-3.1-8b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
        "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336,
    },
    "mistral-nemo-12b": {
        "model_type": "mistral", "vocab_size": 131072, "hidden_size": 5120,
        "num_hidden_layers": 40, "num_attention_heads": 32, "intermediate_size": 14336,
    },
    "nemotron-4-15b": {
        "model_type": "nemotron", "vocab_size": 256000, "hidden_size": 6144,
        "num_hidden_layers": 32, "num_attention_heads": 48, "intermediate_size": 24576,
    },
}  # fmt: skip
COMMON = {"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072}
STUDENT_PARAMS = {
    "llama-3.1-8b": {"width": 4512746496, "depth": 4540469248},
    "mistral-nemo-12b": {"8b": 8414105600},
    "nemotron-4-15b": {"8b": 8271699968, "4b": 4190509056},
}


def test_r14_all_of_them_are_looked_at(cli: Cli) -> None:
    found = subprocess.run(
        ["find", "recipes", "-name", "*.yaml"], cwd=TREE, capture_output=True, text=True, check=True
    ).stdout.split()
    assert sorted(str(p.relative_to(TREE)) for p in SHIPPED) == sorted(found)
    assert set(PUBLISHED) <= {p.stem for p in SHIPPED}
    listed = json.loads(cli("recipes", "ls", "--json").out)
    assert set(listed) == {p.stem for p in SHIPPED}
    assert all(listed.values())  # every one says in its first line what it is for


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_r14_a_shipped_recipe_is_valid_and_plans(path: Path, cli: Cli, tmp_path: Path) -> None:
    assert cli("recipes", "validate", path).code == 0
    arguments: list[str | Path] = ["plan", path, "--json", "--offline", "--out", tmp_path / "run"]
    if path.stem in PUBLISHED:
        teacher = tmp_path / "teacher"
        teacher.mkdir()
        (teacher / "config.json").write_text(json.dumps(PUBLISHED[path.stem] | COMMON))
        assert read_config(teacher)
        arguments += ["--set", f"teacher.model={teacher}"]
    plan = json.loads(cli(*arguments).out)
    # Only what this machine lacks may be a problem: weights, texts, engines, memory, disk.
    lacking = {"input.missing", "input.tokenizer", "input.corpus", "resource", "optional"}
    codes = {p["code"] for p in plan["problems"] if not p["where"].startswith("profile.engines")}
    assert all(c in lacking or c.split(".")[0] in lacking for c in codes), plan["problems"]
    for student, params in STUDENT_PARAMS.get(path.stem, {}).items():
        assert plan["students"][student]["params"] == params


def test_a_copied_recipe_is_the_recipe(cli: Cli, refused: Refused, tmp_path: Path) -> None:
    copy = tmp_path / "new/folder/mine.yaml"
    assert cli("recipes", "cp", "quickstart", copy).code == 0
    assert copy.read_bytes() == (TREE / "recipes/quickstart.yaml").read_bytes()
    refused("recipes", "cp", "quickstart", copy, code=Code.OUT_EXISTS, names="--overwrite")
    refused("recipes", "cp", "quickstar", copy, code=Code.USAGE, names="quickstart")


def test_version_and_help_say_the_same_name() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "paretron", "--version"], capture_output=True, text=True, check=True
    )
    assert re.fullmatch(r"paretron \d+\.\d+\.\d+\S*\n", done.stdout)
