"""Group R: what can be wrong with a recipe or a command line.

A row is a change of a good recipe, or a command line; add one to the table of its kind.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from faults.conftest import CANARY, Cli, Refused, run_and_measure
from makers import PicoMaker
from paretron.artifacts.config import read_config
from paretron.errors import Code, redacted

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
    "R1-depth-3": (
        "  loss: {temprature: 1}\n",
        Code.RECIPE_UNKNOWN_KEY,
        ("distill.loss.temprature", "unknown key 'temprature'", "did you mean temperature?"),
    ),
    "R1-all-at-once": (
        "  loss: {temprature: 1}\n  lr: 3\nscore: {dept: {metric: bi}, batch: l3}\n"
        "profile: {engines: [{name: vllm, dtyp: float32}]}\nexpert: []\n",
        Code.RECIPE_UNKNOWN_KEY,
        (
            "distill.loss.temprature",
            "did you mean temperature?",
            "score.dept",
            "mean depth?",
            "distill.lr",
            "score.batch",
            "profile.engines.0.dtyp",
            "mean dtype?",
            "expert",
            "mean export?",
        ),
    ),
    "R2-type": ("  lr: fast\n", Code.RECIPE_VALUE, ("distill.lr", "a number", "'fast'")),
    "R2-range": ("  lr: 2.0\n", Code.RECIPE_VALUE, ("distill.lr", "less than 1", "2.0")),
    "R2-nan": ("  lr: .nan\n", Code.RECIPE_VALUE, ("distill.lr", "finite", "nan")),
    "R2-negative": ("  lr: -1\n", Code.RECIPE_VALUE, ("distill.lr", "greater than 0", "-1")),
    "R2-bool": ("  lr: true\n", Code.RECIPE_VALUE, ("distill.lr", "a number", "True")),
    "R2-whole-number": (
        "  warmup_steps: -1\n",
        Code.RECIPE_VALUE,
        ("distill.warmup_steps", "-1", "nearest: 0"),
    ),
    "R2-choice": (
        "score: {batch: l3}\n",
        Code.RECIPE_VALUE,
        ("score.batch", "'mean', 'l2' or 'var'", "'l3'"),
    ),
    "R3-apply": (
        "x: !!python/object/apply:os.system ['touch canary']\n",
        Code.RECIPE_SYNTAX,
        ("python/object",),
    ),
    "R3-new": (
        "x: !!python/object/new:os.system ['touch canary']\n",
        Code.RECIPE_SYNTAX,
        ("python/object",),
    ),
    "R3-name": ("x: !!python/name:os.system\n", Code.RECIPE_SYNTAX, ("python/name",)),
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
    "R11-text": (
        f"export: [{{to: hf}}]\nevaluate: {{perplexity: [validation, {CANARY}]}}\n",
        Code.RECIPE_VALUE,
        ("evaluate.perplexity.1", "access token"),
    ),
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
    refused(*verb.split(), recipe, code=code, names=(str(recipe), *names))
    assert not (tmp_path / "canary").exists()


def test_r1_every_error_stands_alone(recipe: Path, refused: Refused) -> None:
    text, code, _ = BROKEN["R1-all-at-once"]
    recipe.write_text(RECIPE + text)
    outcome = refused("plan", recipe, code=code)
    assert len([line for line in outcome.err.splitlines() if line.startswith("error: ")]) == 6


def test_r1_every_wrong_set_at_once(recipe: Path, refused: Refused) -> None:
    sets = ["--set", "seed", "--set", "a..b=1", "--set", "schema.x.y=1"]
    refused("plan", recipe, *sets, code=Code.USAGE, names=("'seed'", "a..b=1", "schema.x.y"))


@pytest.mark.parametrize("id", [id for id in BROKEN if id.startswith("R4")])
def test_r4_in_little_time_and_memory(id: str, recipe: Path) -> None:
    text, code, _ = BROKEN[id]
    recipe.write_text(RECIPE + text)
    began = cpu_seconds_of_children()
    exit_code, peak_kb, heavy = run_and_measure("plan", recipe)
    assert (exit_code, heavy) == (code.exit, [])
    assert peak_kb < 300_000
    assert cpu_seconds_of_children() - began < 1


def cpu_seconds_of_children() -> float:
    """Processor time, so that who else uses the machine does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# R6: what the run's folder holds is what was asked for, also where that is false, 0 or null.
FALSE_VALUES: list[tuple[str, str, object]] = [
    ("prune: {merge_heads: false}\n", "prune.merge_heads", False),
    ("score: {depth: {contiguous: false}}\n", "score.depth.contiguous", False),
    ("  warmup_steps: 0\n", "distill.warmup_steps", 0),
    ("correct: null\n", "correct", None),
    ("profile: null\n", "profile", None),
]


def write_texts(folder: Path, recipe: str) -> str:
    """Texts of a few words: the run starts, and ends when a window is to be filled."""
    for part in ("calibration", "train", "validation"):
        (folder / f"{part}.txt").write_text("a few words")
        recipe = recipe.replace(f"{{corpus: stdlib, part: {part},", f"{{path: {part}.txt,")
    return recipe


@pytest.mark.parametrize(("text", "key", "value"), FALSE_VALUES, ids=[v[1] for v in FALSE_VALUES])
def test_r6_an_explicit_false_is_saved(
    text: str, key: str, value: object, recipe: Path, cli: Cli, pico: PicoMaker, tmp_path: Path
) -> None:
    pico()
    recipe.write_text(write_texts(tmp_path, RECIPE + text))
    assert cli("run", recipe, "--out=run", "--offline").code == Code.INPUT_CORPUS.exit
    found = json.loads((tmp_path / "run/recipe.json").read_text())
    for part in key.split("."):
        found = found[part]
    assert found is value or (found == value and type(found) is type(value))


def test_r7_many_ways_to_say_one_thing(
    recipe: Path, cli: Cli, pico: PicoMaker, tmp_path: Path
) -> None:
    """By default, by --set in any order and spelling, by the file: one recipe."""
    pico()
    recipe.write_text(RECIPE)
    ways: list[list[str | Path]] = [
        ["plan", recipe, "--json"],
        ["plan", recipe, "--set", "distill.lr=1e-4", "--set", "seed=0", "--out", "x", "--json"],
        ["plan", "--json", "--set=seed=0", "--out=x", "--set=distill.lr=0.0001", recipe],
        ["plan", "--out=x", recipe, "--set", "seed=7", "--json", "--set", "seed=0"],
    ]
    found = [json.loads(cli(*way).out) for way in ways]
    recipe.write_text(RECIPE + "  lr: 0.0001\nseed: 0\n")
    found.append(json.loads(cli("plan", recipe, "--json").out))
    assert len({f["recipe_sha256"] for f in found}) == 1
    assert all(f["students"] == found[0]["students"] for f in found)
    changed = json.loads(cli("plan", recipe, "--set", "seed=1", "--json").out)
    assert changed["recipe_sha256"] != found[0]["recipe_sha256"]


@pytest.mark.parametrize("spelling", [["--out", "x"], ["--out=x"], ["-o", "x"], ["-ox"]])
def test_r7_out_in_every_spelling(
    spelling: list[str], recipe: Path, cli: Cli, pico: PicoMaker, tmp_path: Path
) -> None:
    pico()
    recipe.write_text(write_texts(tmp_path, RECIPE))
    cli("run", *spelling, recipe, "--offline")
    assert (tmp_path / "x/recipe.json").is_file()


COMMANDS = {
    "verb": (["plann", "x.yaml"], "plan"),
    "verb-below": (["recipes", "validat"], "validate"),
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
    began = cpu_seconds_of_children()
    exit_code, _, heavy = run_and_measure(*arguments)
    assert (exit_code, heavy) == (2, [])
    assert cpu_seconds_of_children() - began < 0.5


@pytest.mark.parametrize("verb", ["plan", "inspect", "verify"])
def test_r8_a_path_that_the_system_refuses(verb: str, refused: Refused, tmp_path: Path) -> None:
    refused(verb, tmp_path / ("x" * 300), code=Code.USAGE, names="x" * 80)


# R11: a secret that a recipe or the environment holds is nowhere to be seen.


@pytest.mark.parametrize("section", ["teacher.model", "data.train.path", "teacher.revision"])
def test_r11_a_token_is_never_saved(
    section: str, recipe: Path, refused: Refused, pico: PicoMaker, tmp_path: Path
) -> None:
    """A value that is valid otherwise: it would stand in every file of the run."""
    pico()
    override = f"{section}={CANARY}"
    names = (section, "access token")
    refused("run", recipe, "--set", override, "--out", "run", code=Code.RECIPE_VALUE, names=names)
    assert not (tmp_path / "run").exists()


def test_r11_tokens_of_several_makers_are_known() -> None:
    for start in ("hf_", "sk-", "nvapi-", "ghp_", "github_pat_", "glpat-"):
        assert redacted(f"x {start}{'Qx7' * 9} y") == f"x {start}*** y"


def test_r11_nor_shown_in_a_traceback(recipe: Path) -> None:
    recipe.write_text(RECIPE + f"seed: {CANARY}\n")
    done = subprocess.run(
        [sys.executable, "-m", "paretron", "plan", "-v", str(recipe)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert CANARY not in done.stderr + done.stdout


def test_r11_nor_taken_from_the_environment(
    recipe: Path, cli: Cli, pico: PicoMaker, tmp_path: Path
) -> None:
    """HF_TOKEN holds the canary; what is like a token in name alone is kept."""
    pico()
    recipe.write_text(write_texts(tmp_path, RECIPE))
    notes = ["--set", "students={num_memory_tokens: {hidden: 48}}"]
    cli("run", recipe, *notes, "--out", "run", "--offline")
    saved = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert len(saved) >= 3
    assert not [p for p, content in saved.items() if CANARY.encode() in content]
    assert "num_memory_tokens" in json.loads((tmp_path / "run/recipe.json").read_text())["students"]


# id -> the student, and what the message must say besides its key
TARGETS = {
    "larger": ("{hidden: 65}", "at most 64"),
    "more-layers": ("{layers: 5}", "at most 4"),
    "more-heads": ("{heads: 8}", "at most 4"),
    "heads-over-groups": ("{heads: 3}", "nearest: 2 or 4"),
    "same": ("{hidden: 64}", "the same shape"),
    "no-layers": ("{layers: 0}", "nearest: 1"),
    "negative": ("{ffn: -8}", "nearest: 1"),
    "fraction": ("{hidden: 0.75}", "fractional part"),
}


@pytest.mark.parametrize("id", TARGETS)
def test_r12_an_impossible_target(id: str, recipe: Path, refused: Refused, pico: PicoMaker) -> None:
    pico()
    student, says = TARGETS[id]
    recipe.write_text(RECIPE.replace("{hidden: 48}", student))
    refused("plan", recipe, code=Code.RECIPE_TARGET, names=("students.width", says))


def test_r12_no_multiple_of_what_engines_need(
    recipe: Path, refused: Refused, pico: PicoMaker
) -> None:
    """Experts are multiplied together, which takes whole 16 bytes of each row."""
    pico("mixtral")
    recipe.write_text(RECIPE.replace("{hidden: 48}", "{moe_ffn: 44}"))
    refused("plan", recipe, code=Code.RECIPE_TARGET, names=("students.width.moe_ffn", "40 or 48"))


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
