"""The shape of the sources themselves: size, habits, packaging, words."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

TREE = Path(__file__).parents[2]
ROOTS = {
    "paretron": TREE / "toolkit/paretron",
    "paretron_exporters": TREE / "exporters/paretron_exporters",
    "paretron_profiling": TREE / "profiling/paretron_profiling",
    "paretron_recipes": TREE / "recipes",
}
MAX_LINES = 400
MAX_FUNCTION_LINES = 80

# Calls that hide what a thing is, run text as code, or read files that can run code.
FORBIDDEN_CALLS = {
    "hasattr": "state the type instead of probing it",
    "eval": "data decides nothing about code",
    "exec": "data decides nothing about code",
    "__import__": "data decides nothing about code",
    "pickle.load": "a pickle runs code",
    "pickle.loads": "a pickle runs code",
    "torch.load": "a pickle runs code",
    "os.system": "use subprocess with a list",
    "yaml.load": "recipe/yamlfile.py reads YAML",
}
# Text that belongs to one machine, or that says the work is not done.
FORBIDDEN_TEXT = {
    "an absolute path of one machine": r"(?<![\w.~/])/(?:home|root|work|workspace)/[a-z]",
    "a mark of unfinished work": r"\b(?:TODO|FIXME|XXX|HACK)\b",
    "a registry's address": r"https?://[\w.-]*(?:pypi|pythonhosted|download\.pytorch)[\w.-]*",
}
TEXT_SUFFIXES = {
    "", ".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".json", ".cfg", ".j2", ".html", ".css",
    ".js",
}  # fmt: skip


def python_files() -> list[Path]:
    return sorted(p for root in ROOTS.values() for p in root.rglob("*.py"))


def text_files() -> list[Path]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=TREE, check=True, capture_output=True, text=True).stdout
    files = [TREE / n for n in names.splitlines()]
    return [f for f in files if f.suffix in TEXT_SUFFIXES and f.is_file() and f != Path(__file__)]


def test_a_file_tells_one_story() -> None:
    found = {p: len(p.read_text("utf-8").splitlines()) for p in python_files()}
    assert len(found) > 50
    assert {str(p): n for p, n in found.items() if n > MAX_LINES} == {}


def test_a_function_fits_a_screen() -> None:
    assert [
        f"{file.relative_to(TREE)}:{node.lineno}: {node.name} has {node.end_lineno - node.lineno}"
        for file in python_files()
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno > MAX_FUNCTION_LINES
        # A GPU's kernel is one program: what it calls it takes in.
        and "triton.jit" not in map(ast.unparse, node.decorator_list)
    ] == []


def forbidden_calls(text: str) -> list[str]:
    return [
        f"{node.lineno}: {ast.unparse(node.func)}: {FORBIDDEN_CALLS[ast.unparse(node.func)]}"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in FORBIDDEN_CALLS
    ]


@pytest.mark.parametrize("call", FORBIDDEN_CALLS)
def test_a_forbidden_call_is_seen(call: str) -> None:
    assert forbidden_calls(f"def f(x):\n    return {call}(x)\n")


def test_no_forbidden_call() -> None:
    assert [
        f"{p}: {c}" for p in python_files() for c in forbidden_calls(p.read_text("utf-8"))
    ] == []


def test_an_assertion_only_tells_a_type() -> None:
    assert [
        f"{file.relative_to(TREE)}:{node.lineno}"
        for file in python_files()
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Assert)
        and not re.search(r"is not None|isinstance\(", ast.unparse(node.test))
    ] == []


@pytest.mark.parametrize("kind", FORBIDDEN_TEXT)
def test_no_forbidden_text(kind: str) -> None:
    pattern = re.compile(FORBIDDEN_TEXT[kind])
    assert [
        f"{file.relative_to(TREE)}: {match[0]}"
        for file in text_files()
        for match in pattern.finditer(file.read_text("utf-8"))
    ] == []


def test_the_packaged_folders_are_the_folders_there_are() -> None:
    settings = tomllib.loads((TREE / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    there = {
        ".".join((name, *p.parent.relative_to(root).parts))
        for name, root in ROOTS.items()
        for p in root.rglob("__init__.py")
    }
    assert sorted(settings["packages"]) == sorted(there)
    bare = {p.parent for p in python_files() if not (p.parent / "__init__.py").is_file()}
    assert bare == set()


def test_every_floor_has_an_exact_version_above_it() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((TREE / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(r for e in extras if e != "vllm" for r in extras[e])]
    exact = dict(
        line.split("==")
        for line in (TREE / "constraints.txt").read_text("utf-8").splitlines()
        if line and not line.startswith("#")
    )
    for requirement in map(Requirement, lines):
        name = requirement.name.replace(".", "-").lower()
        assert requirement.specifier.contains(exact[name]), f"{requirement} is not {exact[name]}"
