"""Tasks before anything of them is loaded: which there are, what their files say and read.

lm-eval takes seconds to import and to index; the names of what it ships stand in its files.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import importlib.util
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from paretron.errors import Code, ParetronError, Problem
from paretron.recipe import Evaluate, Task
from paretron.recipe.tasks import TASK_SUFFIXES
from paretron.recipe.yamlfile import read_yaml

INSTALL = 'pip install "paretron[eval]"'
# Formats that `datasets` reads by itself from files.
FILE_FORMATS = ("json", "csv", "parquet", "text")

_NOT_YAML = (".py", ".pyc", ".md", ".txt", ".json", ".jsonl", ".csv", ".tsv", ".sh")
_NAMED = re.compile(
    r"""(?m)^["']?(task|group|tag)["']?[ \t]*:[ \t]*"""
    r"""(?:["']?([^\s"'#\[]+)|((?:\n[ \t]*-[ \t]+\S+)+))"""
)
_LISTED = re.compile(r"""-[ \t]+["']?([^\s"']+)""")
_INCLUDED = re.compile(r"""(?m)^include:[ \t]*["']?([^\s"'#]+)""")
_UNSAFE = re.compile(r"(?mi)^unsafe_code:[ \t]*true\b")
# Keys by which a task's file reaches for code, and one that asks for several tasks.
_REACHES_OUT = ("class", "include", "custom_dataset", "use_prompt", "group")
_NAME = re.compile(r"[\w.+-]{1,120}")
# Tasks of lm-eval that run what a model writes and do not say so: sympy's parser is `eval`.
_UNSAID = ("score/math/",)


def lm_eval_missing(where: str) -> Problem | None:
    """What is said when lm-eval is not installed; nothing is imported to find out."""
    if importlib.util.find_spec("lm_eval") is not None:
        return None
    return Problem(
        Code.OPTIONAL_MISSING,
        "lm-eval, which reads tasks and judges answers, is not installed",
        where=where,
        fix=INSTALL,
    )


def lm_eval_version() -> str | None:
    """The version of the installed lm-eval; None without one."""
    try:
        return metadata.version("lm-eval")
    except metadata.PackageNotFoundError:
        return None


@cache
def known_tasks() -> Mapping[str, Path]:
    """Every task, group and tag that the installed lm-eval ships, and the file that defines it.

    Of what is only listed, by a group or as a tag, a file that lists it.
    """
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        return {}
    defined: dict[str, Path] = {}
    listed: dict[str, Path] = {}
    for path in sorted((Path(spec.origin).parent / "tasks").rglob("*")):
        if path.suffix in _NOT_YAML or not path.is_file():
            continue
        for key, one, several in _NAMED.findall(path.read_text("utf-8", "replace")):
            names = defined if one and key != "tag" else listed
            for name in [one] if one else _LISTED.findall(several):
                names.setdefault(name, path)
    return listed | defined


def asked_tasks(evaluate: Evaluate) -> tuple[tuple[Task, ...], dict[str, str], list[Problem]]:
    """The tasks that can be asked, those left out and why, and what is wrong with the rest.

    A suite's task that lm-eval lacks, or that runs code without leave, is left out and told; the
    same of a task that the recipe itself names is a problem. Errors of the latter: OPTIONAL_MISSING
    without lm-eval, RECIPE_VALUE, UNSUPPORTED.
    """
    asked = evaluate.asked
    if not asked:
        return (), {}, []
    if (missing := lm_eval_missing("evaluate.tasks")) is not None:
        return (), {}, [missing]
    good: list[Task] = []
    left_out: dict[str, str] = {}
    problems: list[Problem] = []
    for task in asked:
        problem = _problem(task, run_code=evaluate.run_code)
        if problem is None:
            good.append(task)
        elif task in evaluate.tasks:
            problems.append(problem)
        else:
            left_out[task.task] = f"{problem.cause}; {problem.fix}"
    return tuple(good), left_out, problems + _twice(good)


def _problem(task: Task, *, run_code: bool) -> Problem | None:
    where = f"evaluate.tasks: {task.task}"
    if task.file is not None:
        try:
            unsafe = read_task(task.file, where=where).get("unsafe_code", False) is not False
        except ParetronError as error:
            return error.problems[0]
    elif task.task not in known_tasks():
        return unknown_task(task.task, where=where)
    else:
        unsafe = ships_unsafe(task.task)
    return code_refused(where) if unsafe and not run_code else None


def _twice(tasks: Iterable[Task]) -> list[Problem]:
    """Files whose tasks have a name that another one has: results are known by names."""
    seen: dict[str, str] = {}
    problems = []
    for task in tasks:
        name = task_name(task)
        if name in seen:
            cause = f"it is the task {name!r}, as {seen[name]} is"
            where = f"evaluate.tasks: {task.task}"
            problems.append(
                Problem(Code.RECIPE_VALUE, cause, where=where, fix="give it another `task:`")
            )
        seen[name] = task.task
    return problems


def task_name(task: Task) -> str:
    """What a task is called in results: as lm-eval calls it, or as its file says."""
    return task.task if task.file is None else str(read_task(task.file)["task"])


def unknown_task(name: str, *, where: str) -> Problem:
    """RECIPE_VALUE for a name that lm-eval does not know, with the closest that it does."""
    close = difflib.get_close_matches(name, known_tasks(), n=3, cutoff=0.6)
    return Problem(
        Code.RECIPE_VALUE,
        f"the installed lm-eval has no task {name[:80]!r}",
        where=where,
        fix=f"did you mean {', '.join(close)}?"
        if close
        else "`lm-eval ls tasks` lists its tasks; a file of your own ends in .yaml",
    )


def code_refused(where: str) -> Problem:
    """UNSUPPORTED for a task that runs what a model writes, when nobody allowed it."""
    return Problem(
        Code.UNSUPPORTED,
        "it runs the code that a model writes, on this machine and without a sandbox",
        where=where,
        fix="`evaluate.run_code: true` or --run-code allows it: in a container, on a machine that "
        "can be lost",
    )


def ships_unsafe(name: str) -> bool:
    """Whether a task that lm-eval ships runs code, as its file says, one it includes, or we."""
    seen: set[Path] = set()
    waiting = [path] if (path := known_tasks().get(name)) is not None else []
    while waiting:
        path = waiting.pop()
        if path in seen or not path.is_file():
            continue
        seen.add(path)
        if any(f"/tasks/{folder}" in path.as_posix() for folder in _UNSAID):
            return True
        text = path.read_text("utf-8", "replace")
        if _UNSAFE.search(text):
            return True
        waiting += [path.parent / name for name in _INCLUDED.findall(text)]
    return False


def read_task(path: Path, *, where: str | None = None) -> dict[str, Any]:
    """What a task's file says, as plain values; paths of data are absolute, the file's neighbours.

    Errors: INPUT_MISSING, RECIPE_SYNTAX, and UNSUPPORTED for keys and tags that reach for code.
    """
    where = where or str(path)
    if not path.is_file():
        raise ParetronError(
            Problem(
                Code.INPUT_MISSING,
                "no such file",
                where=where,
                fix="name a task's YAML file, or a task that lm-eval knows",
            )
        )
    if "!function" in path.read_text("utf-8", "replace"):
        raise _refused(where, "'!function' runs code")
    content = read_yaml(path)
    if found := [key for key in _REACHES_OUT if key in content]:
        raise _refused(where, f"{found[0]!r} may run code, or several tasks")
    if not isinstance(content.get("task"), str) or not _NAME.fullmatch(content["task"]):
        cause = f"its `task` is {str(content.get('task'))[:60]!r}"
        fix = "a name of letters, digits and ._+-"
        raise ParetronError(Problem(Code.RECIPE_VALUE, cause, where=where, fix=fix))
    metrics = content.get("metric_list") or []
    if any(isinstance(m, dict) and m.get("hf_evaluate") for m in metrics):
        raise _refused(where, "a metric by `hf_evaluate` is code from the hub")
    if content.get("dataset_path") == "pandas":
        raise _refused(where, "the data set 'pandas' reads pickles, which run code")
    named = (content.get("dataset_path"), content.get("dataset_kwargs"))
    if far := [text for text in _texts(list(named)) if "://" in text.removeprefix("hf://")]:
        raise _refused(where, f"{far[0][:80]!r} is neither a file of this machine nor the hub's")
    return content | _near(content, path.absolute().parent)


def _refused(where: str, cause: str) -> ParetronError:
    fix = "templates, data and lm-eval's own metrics alone, in one file"
    return ParetronError(Problem(Code.UNSUPPORTED, cause, where=where, fix=fix))


def _near(content: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The keys that name data, with paths relative to the folder made absolute."""

    def near(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: near(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [near(inner) for inner in value]
        return str(folder / value) if isinstance(value, str) and "://" not in value else value

    dataset, settings = content.get("dataset_path"), content.get("dataset_kwargs")
    if dataset in FILE_FORMATS:
        if not isinstance(settings, dict):
            return {}
        named = {key: near(settings[key]) for key in ("data_files", "data_dir") if key in settings}
        return {"dataset_kwargs": settings | named}
    if isinstance(dataset, str) and (folder / dataset).exists():
        return {"dataset_path": str(folder / dataset)}
    return {}


def shipped_file(name: str) -> Path | None:
    """The file in which lm-eval ships a single task of that name; None for a group or a tag."""
    path = known_tasks()[name]
    text = path.read_text("utf-8", "replace") if path.suffix in TASK_SUFFIXES else ""
    single = re.search(rf"""(?m)^task:[ \t]*["']?{re.escape(name)}["']?[ \t]*$""", text)
    return path if single and not re.search(r"(?m)^group[ \t]*:", text) else None


def reads_own_files(content: str | Mapping[str, Any]) -> bool:
    """Whether what a task's file says names no data but files of this machine."""
    if isinstance(content, str):
        return False
    settings = content.get("dataset_kwargs") or {}
    dataset = content.get("dataset_path")
    local = dataset in FILE_FORMATS or (isinstance(dataset, str) and os.path.isabs(dataset))
    return local and not any("://" in text for text in _texts(settings))


def task_files(path: Path) -> list[Path]:
    """A task's file and the local files that its documents are read from."""
    content = read_task(path)
    settings = content.get("dataset_kwargs") or {}
    named = [content.get("dataset_path"), settings.get("data_files"), settings.get("data_dir")]
    texts = [text for value in named for text in _texts(value) if Path(text).is_absolute()]
    data = {Path(name) for text in texts for name in glob.glob(text, recursive=True)}
    inside = {p for folder in data if folder.is_dir() for p in folder.rglob("*")}
    return [path, *sorted(p for p in data | inside if p.is_file())]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def task_sha256(path: Path) -> str:
    """A hash over what a task's file says and the bytes of the files that it reads, in order."""
    from paretron.artifacts.manifest import sha256_file  # with numpy, which planning is without

    total = hashlib.sha256()
    for file in task_files(path):
        total.update(sha256_file(file).encode())
    return total.hexdigest()
