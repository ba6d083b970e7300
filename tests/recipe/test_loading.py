"""A recipe is read strictly, told about completely, and means the same wherever it is run."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from paretron.errors import Code, ParetronError, Problem
from paretron.recipe import Recipe, Score, load_recipe
from paretron.recipe.yamlfile import MAX_RECIPE_BYTES, parse_scalar, read_yaml

MINIMAL = """\
schema: 1
teacher: {model: ./teacher}
data:
  calibration: {path: calibration.txt}
  train: {path: train.jsonl}
  validation: {path: validation.txt}
students:
  width: {hidden: 64}
distill:
  tokens: 1.0e6
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL)
    return path


def problems(path: Path, *overrides: str) -> tuple[Problem, ...]:
    with pytest.raises(ParetronError) as caught:
        load_recipe(path, overrides=overrides)
    assert caught.value.exit_code == 2
    assert all(p.cause and p.where and p.fix and "\n" not in p.cause for p in caught.value.problems)
    return caught.value.problems


def test_a_minimal_recipe(recipe: Path) -> None:
    loaded = load_recipe(recipe)
    assert loaded.distill.tokens == 1_000_000
    assert isinstance(loaded.distill.tokens, int)
    assert loaded.score.sequence == "mean"
    assert [e.to for e in loaded.export] == ["hf"]


def test_a_recipe_is_frozen(recipe: Path) -> None:
    with pytest.raises(ValidationError):
        load_recipe(recipe).seed = 1


SYNTAX = {
    "empty": ("", "not a mapping"),
    "a list": ("- 1\n", "not a mapping"),
    "two documents": (MINIMAL + "---\na: 1\n", "another document"),
    "a key twice": (MINIMAL + "seed: 1\nseed: 2\n", '"seed" stands twice'),
    "a nested key twice": (MINIMAL + "score: {batch: l2, batch: mean}\n", '"batch" stands twice'),
    "an alias": (MINIMAL + "x: &a [1]\ny: *a\n", "aliases"),
    "a merge": (MINIMAL + "x: &a {}\ny: {<<: *a}\n", "aliases"),
    "a Python tag": (MINIMAL + "seed: !!python/object/apply:os.system [x]\n", "python/object"),
    "a local tag": (MINIMAL + "seed: !seed 1\n", "!seed"),
    "unclosed": (MINIMAL + "x: [1\n", "expected"),
    "a tab": (MINIMAL + "score:\n\tbatch: l2\n", "found character"),
    "a control character": (MINIMAL + "x: \x07\n", "unacceptable"),
    "a mapping as a key": (MINIMAL + "? {a: 1}\n: 2\n", "unhashable"),
    "an impossible date": (MINIMAL + "seed: 2001-99-99\n", "month"),
    "too deep": (MINIMAL + "x: " + "[" * 500 + "]" * 500, "deeper"),
    "a number without end": (MINIMAL + f"seed: {'9' * 5000}\n", "4300 digits"),
}  # fmt: skip


@pytest.mark.parametrize("name", SYNTAX)
def test_what_a_recipe_never_needs_is_refused(name: str, recipe: Path) -> None:
    text, says = SYNTAX[name]
    recipe.write_text(text)
    (problem,) = problems(recipe)
    assert problem.code is Code.RECIPE_SYNTAX
    assert says in problem.cause
    assert str(recipe) in problem.where


def test_the_line_is_named(recipe: Path) -> None:
    recipe.write_text(MINIMAL + "seed: 1\nseed: 2\n")
    assert problems(recipe)[0].where == f"{recipe}:12"


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a: \xff\n"])
def test_not_text(content: bytes, recipe: Path) -> None:
    recipe.write_bytes(content)
    assert problems(recipe)[0].code is Code.RECIPE_SYNTAX


def test_no_such_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path, tmp_path / ("x" * 300)):
        assert problems(path)[0].cause == "no such file"


@pytest.mark.parametrize("mib", [1, 50])
def test_a_large_file_is_refused_unread(mib: int, recipe: Path) -> None:
    with recipe.open("wb") as f:
        f.truncate(mib << 20)
    start = time.monotonic()
    assert "so not a recipe" in problems(recipe)[0].cause
    assert time.monotonic() - start < 1


def test_every_error_at_once_with_the_closest_names(recipe: Path) -> None:
    recipe.write_text(
        MINIMAL.replace("hidden: 64", "hiden: 64, ffn: -1").replace(
            "tokens: 1.0e6", "tokens: 1.0e6\n  loss: {temprature: 2}\n  lr: .nan"
        )
        + "scor: {}\nexport: [{too: hf}]\nprofile: {engines: [{name: vllm, pyton: x}]}\n"
    )
    found = {p.where.split(": ")[1]: p for p in problems(recipe)}
    closest = {k: p.fix for k, p in found.items() if p.code is Code.RECIPE_UNKNOWN_KEY}
    assert closest == {
        "scor": "did you mean score?",
        "students.width.hiden": "did you mean hidden?",
        "distill.loss.temprature": "did you mean temperature?",
        "export.0.too": "did you mean to?",
        "profile.engines.0.pyton": "did you mean python?",
    }
    assert "greater than 0 (found -1)" in found["students.width.ffn"].cause
    assert "finite number (found nan)" in found["distill.lr"].cause
    assert found["export.0.to"].fix == "add export.0.to"


def test_a_key_that_resembles_nothing_lists_what_is_allowed(recipe: Path) -> None:
    (problem,) = problems(recipe, "score.zzz=1")
    assert problem.fix == f"allowed: {', '.join(Score.model_fields)}"


VALUES = [
    ("students.width.hidden", "true", "number (found True)"),
    ("students.width.hidden", '"64"', "number (found '64')"),
    ("students.width.hidden", "64.5", "fractional part"),
    ("students.width.hidden", "0", "greater than 0"),
    ("students.width.hidden", "9" * 400, "less than or equal"),
    ("students.width.hidden", "[64]", "found [64]"),
    ("students.width", "{}", "at least one of hidden"),
    ("students", "{}", "at least 1"),
    ("students.Width", "{hidden: 1}", "match pattern"),
    ("students.teacher", "{hidden: 1}", "cannot be named teacher"),
    ("distill.lr", "1.0", "less than 1"),
    ("distill.lr", "-1e-4", "greater than 0"),
    ("distill.lr", ".inf", "finite"),
    ("distill.min_lr", "0.5", "above lr"),
    ("distill.global_batch", "7", "equal to 7|multiple of micro_batch"),
    ("distill.dtype", "float8", "'float32' or 'bfloat16'"),
    ("distill.tokens", "1.0e400", "finite"),
    ("score.batch", "L2", "'mean', 'l2' or 'var'"),
    ("score.depth.contiguous", "maybe", "boolean"),
    ("teacher.revision", '"a\\0b"', "match pattern"),
    ("teacher.model", "null", "exactly one of model and pretrain"),
    ("data.train.corpus", "stdlib", "exactly one of path, dataset, corpus and sources"),
    ("data.train.path", "''", "at least 1 character"),
    ("prune.max_shard_gb", "101", "less than or equal to 100"),
    ("profile", "{engines: [], lengths: [[128, 1]]}", "greater than or equal to 2"),
    ("profile", "{engines: [{name: x, ports: {t: 65536}}]}", "less than or equal to 65535"),
    ("profile", "{engines: [{name: x, servers: {t: ftp://a}}]}", "match pattern"),
    ("seed", "-1", "greater than or equal to 0"),
    ("schema", "2", "should be 1"),
]


@pytest.mark.parametrize(("key", "value", "says"), VALUES, ids=lambda v: str(v)[:24])
def test_a_value_out_of_range_is_shown_with_the_range(
    key: str, value: str, says: str, recipe: Path
) -> None:
    if key == "distill.global_batch":
        found = problems(recipe, "distill.global_batch=7", "distill.micro_batch=2")
    else:
        found = problems(recipe, f"{key}={value}")
    assert all(p.code is Code.RECIPE_VALUE for p in found)
    assert any(part in p.cause for p in found for part in says.split("|"))


@pytest.mark.parametrize("key", ["_target_", "_component_", "__class__"])
def test_dotted_paths_to_code_are_unknown_keys(key: str, recipe: Path) -> None:
    (problem,) = problems(recipe, f"distill.{key}=os.system")
    assert problem.code is Code.RECIPE_UNKNOWN_KEY


def test_interpolation_is_only_text(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY", "seen")
    loaded = load_recipe(recipe, overrides=["teacher.model=${env:CANARY}"])
    assert loaded.teacher.model == "${env:CANARY}"


def test_a_tag_in_a_value_is_text(recipe: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    found = problems(recipe, f"seed=!!python/object/apply:os.system ['touch {canary}']")
    assert found[0].code is Code.RECIPE_VALUE
    assert not canary.exists()


FALSE_VALUES: list[tuple[str, str, Any]] = [
    ("prune.merge_heads", "false", False),
    ("score.depth.contiguous", "false", False),
    ("score.depth.contiguous", "no", False),
    ("distill.warmup_steps", "0", 0),
    ("distill.weight_decay", "0", 0.0),
    ("distill.min_lr", "0", 0.0),
    ("correct", "null", None),
    ("profile", "null", None),
    ("export", "[]", ()),
]


@pytest.mark.parametrize(("key", "text", "value"), FALSE_VALUES)
def test_an_explicit_false_overrides_a_true_default(
    key: str, text: str, value: object, recipe: Path
) -> None:
    found: Any = load_recipe(recipe, overrides=[f"{key}={text}"])
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_set_and_file_and_default_are_one_recipe(recipe: Path) -> None:
    overrides = ["distill.lr=1e-4", "seed=0", "score.batch=l2", "students.width.hidden=64"]
    by_default = load_recipe(recipe)
    for seed in range(5):
        random.Random(seed).shuffle(overrides)
        assert load_recipe(recipe, overrides=overrides) == by_default
    changed = load_recipe(recipe, overrides=["distill.lr=3e-4", "score.depth={metric: bi}"])
    recipe.write_text(MINIMAL + "  lr: 0.0003\nscore: {depth: {metric: bi}}\n")
    assert load_recipe(recipe) == changed != by_default


def test_the_last_set_wins(recipe: Path) -> None:
    assert load_recipe(recipe, overrides=["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seed", "is not key=value"),
        ("=1", "is not key=value"),
        ("a..b=1", "is not key=value"),
        ("seed.x.y=1", "x holds a value|integer|number"),
        ("schema.x.y=1", "holds a value"),
        ("export.5.to=hf", "not a position"),
        ("export.to=hf", "not a position"),
    ],
)
def test_a_set_that_leads_nowhere(text: str, says: str, recipe: Path) -> None:
    recipe.write_text(MINIMAL + "export: [{to: hf}]\n")
    assert any(part in p.cause for p in problems(recipe, text) for part in says.split("|"))


def test_set_reaches_into_lists(recipe: Path) -> None:
    recipe.write_text(MINIMAL + "export: [{to: hf}, {to: hf}]\n")
    loaded = load_recipe(recipe, overrides=["export.1.to=onnx"])
    assert [e.to for e in loaded.export] == ["hf", "onnx"]


def test_paths_are_relative_to_the_recipe(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe.write_text(
        MINIMAL.replace("train.jsonl", "/data/*.jsonl").replace("validation.txt", "~/v.txt")
        + "profile: {engines: [{name: vllm, python: venv/bin/python}]}\n"
        + "score: {depth: {metric: task, task: tasks/own.yaml}}\n"
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("HOME", "/the/home")
    seen = []
    for folder, path in ((tmp_path, "recipe.yaml"), (tmp_path / "elsewhere", "../recipe.yaml")):
        monkeypatch.chdir(folder)
        seen.append(load_recipe(Path(path)))
    first = seen[0]
    assert first.teacher.model == str(tmp_path / "teacher")
    assert first.data.calibration.path == str(tmp_path / "calibration.txt")
    assert first.data.train.path == "/data/*.jsonl"
    assert first.data.validation.path == "/the/home/v.txt"
    assert first.profile is not None
    assert first.profile.engines[0].python == tmp_path / "venv/bin/python"
    assert first.score.depth.task_file == tmp_path / "tasks/own.yaml"
    for there in (seen[1].data.calibration.path, seen[1].teacher.model):
        assert there is not None
        assert Path(there).resolve().parent == tmp_path.resolve()


def test_a_hub_id_stays_one_unless_a_folder_has_its_name(recipe: Path, tmp_path: Path) -> None:
    overrides = ["teacher.model=meta-llama/Llama-3.1-8B"]
    assert load_recipe(recipe, overrides=overrides).teacher.model == "meta-llama/Llama-3.1-8B"
    (tmp_path / "meta-llama/Llama-3.1-8B").mkdir(parents=True)
    local = load_recipe(recipe, overrides=overrides).teacher.model
    assert local == str(tmp_path / "meta-llama/Llama-3.1-8B")


def test_the_pretrained_teacher_is_plain_data(recipe: Path) -> None:
    pretrain = (
        "teacher={pretrain: {config: {model_type: llama, x: X}, tokenizer: {vocab_size: 300},"
        " data: {path: p.txt}, tokens: 5}}"
    )
    loaded = load_recipe(recipe, overrides=[pretrain.replace("X", "1")])
    assert loaded.teacher.pretrain is not None
    for value in (".nan", ".inf", "2001-01-01"):
        found = problems(recipe, pretrain.replace("X", value))
        assert "JSON" in found[0].cause


def test_a_token_is_never_echoed(recipe: Path) -> None:
    token = "hf_" + "aB3" * 11
    for override in (f"seed={token}", f"{token}=1", f"teacher.{token}=1", token):
        assert all(token not in str(p) for p in problems(recipe, override))
    assert "num_memory_tokens" in str(problems(recipe, "num_memory_tokens=1")[0])


def test_defaults_are_themselves_valid(recipe: Path) -> None:
    loaded = load_recipe(recipe)
    assert Recipe.model_validate(loaded.model_dump(by_alias=True)) == loaded


@given(st.text(max_size=60))
def test_any_text_is_a_mapping_or_refused(text: str) -> None:
    import tempfile

    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8", newline="") as f:
        try:
            f.write(text)
        except UnicodeEncodeError:  # half of a surrogate pair is no text
            return
        f.flush()
        try:
            assert isinstance(read_yaml(Path(f.name)), dict)
        except ParetronError as error:
            assert error.problems[0].code is Code.RECIPE_SYNTAX


LINES = st.lists(
    st.sampled_from(
        ["a: 1", "- 1", "  b: [1", "]", "{", "}", "&x y", "*x", "!!int 1", "? k", ": v", "'q",
         '"', "|", ">", "%YAML 1.1", "---", "...", "# c", "2001-01-01", "~", "<<: {a: 1}", "\t",
         "a: 1", "0x1F", "1_000", ".nan", "seed: 1", "schema: 1", "students: {w: {hidden: 1}}"]
    ),
    max_size=8,
)  # fmt: skip


@given(LINES)
def test_any_lines_of_yaml_are_a_recipe_or_refused(lines: list[str]) -> None:
    import tempfile

    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as f:
        f.write("\n".join(lines))
        f.flush()
        with pytest.raises(ParetronError) as caught:
            load_recipe(Path(f.name))
        assert caught.value.exit_code == 2


@given(st.text(max_size=40))
def test_any_value_of_a_set_is_data(text: str) -> None:
    assert not callable(parse_scalar(text))


@pytest.mark.parametrize("text", ["[" * 100_000, "2001-99-99", "*a", "&a 1", "!!int 1", "[1"])
def test_a_value_of_a_set_that_is_no_yaml_is_text_or_plain(text: str) -> None:
    assert parse_scalar(text) in (text, 1)


def test_the_size_limit_leaves_room(recipe: Path) -> None:
    recipe.write_text(MINIMAL + "# comment\n" * 2000)
    assert recipe.stat().st_size < MAX_RECIPE_BYTES
    load_recipe(recipe)
