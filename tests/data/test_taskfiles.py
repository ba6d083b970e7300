"""Tasks by name and by file, before lm-eval is imported: what is there, what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from paretron.data.taskfiles import (
    asked_tasks,
    known_tasks,
    read_task,
    shipped_file,
    task_files,
    task_name,
    task_sha256,
)
from paretron.errors import Code, ParetronError
from paretron.recipe import Evaluate, Task
from picotask import TASK, write_task

pytest.importorskip("lm_eval", reason="lm-eval is an extra")

LINES = ['{"choices": ["a", "b"], "gold": 0}']


def evaluate(*tasks: object, **more: object) -> Evaluate:
    return Evaluate.model_validate({"tasks": list(tasks)} | more)


def test_names_are_known_without_importing_anything() -> None:
    code = (
        "import json, sys\n"
        "from paretron.data.taskfiles import asked_tasks\n"
        "from paretron.recipe import Evaluate\n"
        f"settings = Evaluate.model_validate({{'tasks': ['piqa', {str(TASK)!r}, 'pica']}})\n"
        "good, out, problems = asked_tasks(settings)\n"
        "print(json.dumps([len(good), out, [p.fix for p in problems],"
        " sorted({'lm_eval', 'torch', 'transformers', 'datasets'} & set(sys.modules))]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    good, left_out, fixes, heavy = json.loads(done.stdout)
    assert (good, left_out, heavy) == (2, {}, [])
    assert "piqa" in fixes[0]


def test_what_lm_eval_indexes_is_known_from_its_files() -> None:
    from lm_eval.tasks import TaskManager

    index = TaskManager().task_index
    assert set(index) - set(known_tasks()) == set()
    # A single task is loaded by its file, so that nobody waits for the index.
    files = {name: found for name in index if (found := shipped_file(name)) is not None}
    assert {name for name, file in files.items() if file != index[name].yaml_path} == set()
    assert {index[name].kind.name for name in files} == {"TASK", "PY_TASK"}
    assert len(files) > 9000
    suite = ("winogrande", "arc_challenge", "hellaswag", "truthfulqa_mc2", "gsm8k", "mbpp", "piqa")
    assert set(suite) <= set(files)
    assert not {"mmlu", "mmlu_stem", "ai2_arc"} & set(files)


def test_the_papers_suite() -> None:
    suite = Evaluate.model_validate({"suite": "minitron-base"})
    asked = {task.task: task for task in suite.asked}
    shots = {
        "mmlu": 5, "winogrande": 5, "arc_challenge": 25, "hellaswag": 10, "truthfulqa_mc2": 0,
        "gsm8k": 5, "xlsum_english": 3, "humaneval": 0, "mbpp": 0,
    }  # fmt: skip
    assert {name: task.few_shot for name, task in asked.items()} == shots
    assert asked["hellaswag"].metric == asked["arc_challenge"].metric == "acc_norm"
    for name, samples in (("humaneval", 20), ("mbpp", 1)):
        sampling = asked[name].sampling
        assert sampling is not None
        assert (sampling.temperature, sampling.top_p, sampling.samples) == (0.2, 0.95, samples)
    good, left_out, problems = asked_tasks(suite)
    assert problems == []
    assert [task.task for task in good] == list(shots)[:6]
    assert list(left_out) == ["xlsum_english", "humaneval", "mbpp"]
    assert "the installed lm-eval has no task 'xlsum_english'" in left_out["xlsum_english"]
    assert "run_code" in left_out["mbpp"]
    allowed = asked_tasks(Evaluate.model_validate({"suite": "minitron-base", "run_code": True}))
    assert list(allowed[1]) == ["xlsum_english"]


@pytest.mark.parametrize(
    ("tasks", "more", "code", "named"),
    [
        (["winogrand"], {}, Code.RECIPE_VALUE, "did you mean winogrande"),
        (["humaneval"], {}, Code.UNSUPPORTED, "--run-code"),
        (["cruxeval_input"], {}, Code.UNSUPPORTED, "without a sandbox"),  # said in what it includes
        (["prompt_robustness_math_algebra"], {}, Code.UNSUPPORTED, "without a sandbox"),  # unsaid
        (["absent.yaml"], {}, Code.INPUT_MISSING, "no such file"),
    ],
)
def test_what_a_recipe_names_itself_is_refused(
    tasks: list[str], more: dict[str, object], code: Code, named: str
) -> None:
    good, left_out, problems = asked_tasks(evaluate("piqa", *tasks, **more))
    assert [task.task for task in good] == ["piqa"]
    assert left_out == {}
    (problem,) = problems
    assert problem.code is code
    assert named in f"{problem.cause} {problem.fix}"
    assert tasks[0] in problem.where


def test_naming_a_suites_task_oneself_takes_its_place() -> None:
    settings = evaluate({"task": "gsm8k", "limit": 7}, "mbpp", suite="minitron-base")
    good, left_out, problems = asked_tasks(settings)
    assert [t.limit for t in good if t.task == "gsm8k"] == [7]
    assert [p.code for p in problems] == [Code.UNSUPPORTED]  # named: no longer left out
    assert list(left_out) == ["xlsum_english", "humaneval"]


def test_two_files_of_one_task_would_be_one_result(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    paths = [write_task(folder, "same", LINES) for folder in (tmp_path, tmp_path / "a")]
    _, _, problems = asked_tasks(evaluate(*map(str, paths)))
    (problem,) = problems
    assert problem.code is Code.RECIPE_VALUE
    assert "'same'" in problem.cause


# What stands in a file -> the code, and what is named.
REFUSED: dict[str, tuple[dict[str, str], Code, str]] = {
    "function": ({"doc_to_target": "!function evil.run"}, Code.UNSUPPORTED, "'!function'"),
    "commented": ({"doc_to_target": "gold # !function evil.run"}, Code.UNSUPPORTED, "'!function'"),
    "other-tag": ({"doc_to_target": "!!python/name:os.system x"}, Code.RECIPE_SYNTAX, "tag"),
    "include": ({"include": "other.yaml"}, Code.UNSUPPORTED, "'include'"),
    "class": ({"class": "evil.Task"}, Code.UNSUPPORTED, "'class'"),
    "group": ({"group": "several"}, Code.UNSUPPORTED, "'group'"),
    "prompt": ({"use_prompt": "promptsource:x"}, Code.UNSUPPORTED, "'use_prompt'"),
    "hub-metric": ({"metric_list": "[{metric: ./evil, hf_evaluate: true}]"}, Code.UNSUPPORTED,
                   "hf_evaluate"),
    "pickle": ({"dataset_path": "pandas"}, Code.UNSUPPORTED, "reads pickles"),
    "address": ({"dataset_kwargs": "{data_files: {test: 'https://192.0.2.1/a.jsonl'}}"},
                Code.UNSUPPORTED, "https://192.0.2.1"),
    "address-within": ({"dataset_kwargs": "{data_files: ['hf://a/b::https://192.0.2.1/a']}"},
                       Code.UNSUPPORTED, "neither a file of this machine"),
    "name": ({"task": "../../out"}, Code.RECIPE_VALUE, "../../out"),
    "several": ({"task": "[a, b]"}, Code.RECIPE_VALUE, "'a', 'b'"),
    "twice": ({"dataset_name": "a\ndataset_name: b"}, Code.RECIPE_SYNTAX, "stands twice"),
}  # fmt: skip


@pytest.mark.parametrize("row", REFUSED)
def test_a_file_that_reaches_for_code_or_is_none_is_refused(row: str, tmp_path: Path) -> None:
    changes, code, named = REFUSED[row]
    canary = tmp_path / "canary"
    (tmp_path / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()\n")
    path = write_task(tmp_path, "odd", LINES, **changes)
    for read in (
        lambda: read_task(path),
        lambda: asked_tasks(evaluate(str(path)))[2] and read_task(path),
    ):
        with pytest.raises(ParetronError) as caught:
            read()
        (problem,) = caught.value.problems
        assert problem.code is code
        assert named in problem.cause
    assert not canary.exists()


def test_a_metric_that_lm_eval_lacks_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    from paretron.data.harness import load_tasks

    path = write_task(tmp_path, "odd", LINES, metric_list="[{metric: ./evil}]")
    with pytest.raises(ParetronError) as caught:
        load_tasks(str(path), where="here")
    assert "no metric './evil'" in caught.value.problems[0].cause


def test_unsafe_code_in_a_file_needs_leave(tmp_path: Path) -> None:
    path = str(write_task(tmp_path, "runs", LINES, unsafe_code="true"))
    assert [p.code for p in asked_tasks(evaluate(path))[2]] == [Code.UNSUPPORTED]
    assert asked_tasks(evaluate(path, run_code=True))[0] == (Task(task=path),)


def test_a_tasks_identity_is_what_it_says_and_reads(tmp_path: Path) -> None:
    path = write_task(tmp_path, "mine", LINES, dataset_kwargs="{data_files: {test: 'mine*.jsonl'}}")
    assert task_files(path) == [path, tmp_path / "mine.jsonl"]
    assert task_name(Task(task=str(path))) == "mine"
    before = task_sha256(path)
    (tmp_path / "mine.jsonl").write_text(LINES[0] + "\n\n")
    edited = task_sha256(path)
    path.write_text(path.read_text() + "num_fewshot: 0\n")
    assert len({before, edited, task_sha256(path)}) == 3


def test_paths_in_a_file_are_its_neighbours(tmp_path: Path) -> None:
    files = "{data_files: {test: [a.jsonl, 'hf://datasets/a/b.jsonl']}}"
    path = write_task(tmp_path, "mine", LINES, dataset_kwargs=files)
    found = read_task(path)["dataset_kwargs"]["data_files"]["test"]
    assert found == [str(tmp_path / "a.jsonl"), "hf://datasets/a/b.jsonl"]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/x.jsonl").write_text("{}\n")
    path = write_task(tmp_path, "mine", LINES, dataset_path="folder", dataset_kwargs="{}")
    assert read_task(path)["dataset_path"] == str(tmp_path / "folder")
    assert task_files(path) == [path, tmp_path / "folder/x.jsonl"]
