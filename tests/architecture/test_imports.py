"""The arrows between packages, read from the sources: a rule that only a person keeps is broken."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

TREE = Path(__file__).parents[2]
ROOTS = {
    "toolkit": "paretron",
    "exporters": "paretron_exporters",
    "profiling": "paretron_profiling",
}

# Package -> what it may import of ours, besides itself. Arrows point down; what a row leaves out
# is forbidden. A dotted entry allows that module alone.
# The bare "paretron" is the root's own file alone: the version, the folder.
GROUND = {
    "paretron",
    "paretron.errors",
    "paretron.families",
    "paretron.artifacts",
    "paretron.recipe",
}
STAGE = GROUND | {"paretron.data", "paretron.workers"}
PLUGIN = GROUND | {"paretron.evaluate.parity", "paretron.versions"}
MAY_IMPORT: dict[str, set[str]] = {
    "paretron": {"paretron.cli"},  # `python -m paretron`
    "paretron.errors": set(),
    "paretron.plugins": {"paretron.errors"},
    "paretron.versions": {"paretron.errors"},
    "paretron.families": {"paretron.errors"},
    "paretron.artifacts": {"paretron", "paretron.errors", "paretron.families"},
    "paretron.recipe": {"paretron.errors"},
    "paretron.data": GROUND,
    "paretron.workers": {"paretron", "paretron.errors"},
    # Counting shapes is planning; the rest of a search is not.
    "paretron.plan": STAGE
    | {
        "paretron.plugins",
        "paretron.compensate.decide",  # what applies to a student follows from configs alone
        "paretron.search.candidates",
        "paretron.search.costs",
        "paretron.search.space",
        "paretron.search.table",
    },
    "paretron.importance": STAGE,
    "paretron.surgery": STAGE | {"paretron.importance.scores"},
    "paretron.compensate": STAGE | {"paretron.importance", "paretron.surgery"},
    "paretron.search": STAGE
    | {
        "paretron.plan.cost",
        "paretron.importance",
        "paretron.surgery",
        "paretron.compensate",  # a candidate is ranked as it will start
    },
    "paretron.distill": STAGE,
    "paretron.evaluate": STAGE,
    "paretron.run": STAGE
    | {
        "paretron.plugins",
        "paretron.plan",
        "paretron.importance",
        "paretron.surgery",
        "paretron.compensate",
        "paretron.search",
        "paretron.distill",
        "paretron.evaluate",
        # Measuring is not an engine: engines themselves are reached by entry points.
        "paretron_profiling.bench",  # drives the tools of others, which are processes
        "paretron_profiling.goals",
        "paretron_profiling.machine",
        "paretron_profiling.measure",
        "paretron_profiling.models",
        "paretron_profiling.report",
        "paretron_profiling.result",
        "paretron_profiling.roofline",
        "paretron_profiling.schema",
        "paretron_profiling.servers.serving",
    },
    # A quantised form is calibrated on a text and judged on another.
    "paretron_exporters": PLUGIN | {"paretron.data", "paretron.evaluate.perplexity"},
    # What a model costs by its config is planning that a roofline needs.
    "paretron_profiling": PLUGIN
    | {
        "paretron.plugins",
        "paretron.plan.cost",
        "paretron.search.table",  # its rows can be measured on any engine
        "paretron.workers.devices",
    },
}
MAY_IMPORT["paretron.cli"] = {
    *MAY_IMPORT["paretron.run"],
    "paretron.run",
    "paretron.versions",
}

# Serving engines and their tools: one file of a source root, and only when used.
ENGINES = {
    "gguf", "llmcompressor", "lm_eval", "modelopt", "onnx", "onnxruntime", "onnxruntime_genai",
    "peft", "pyarrow", "pynvml", "tensorboard", "tensorrt_llm", "tritonclient", "vllm",
    "trackio",
    "wandb",
}  # fmt: skip

# Where an import name differs from the distribution that has it.
DISTRIBUTION = {
    "click": "typer", "huggingface_hub": "transformers", "pydantic_core": "pydantic",
    "ruamel": "ruamel.yaml", "modelopt": "nvidia-modelopt", "lm_eval": "lm-eval",
    "google": "tritonclient", "pynvml": "nvidia-ml-py", "datasets": "lm-eval",
    "markupsafe": "jinja2", "onnxruntime_genai": "onnxruntime-genai", "yaml": "transformers",
}  # fmt: skip

HEAVY = {"torch", "transformers", "onnxruntime", "plotly", "numpy"}
# Commands that only look must answer at once: none of HEAVY may come with these.
LIGHT = (
    "paretron.cli.main", "paretron.errors", "paretron.families", "paretron.plan",
    "paretron.plugins", "paretron.recipe", "paretron.run", "paretron_exporters",
    "paretron_profiling",
)  # fmt: skip


class Import(NamedTuple):
    """One import statement: who, what, and whether it runs when the file is imported."""

    file: Path
    line: int
    target: str
    names: tuple[str, ...]
    at_import: bool

    @property
    def where(self) -> str:
        return f"{self.file.relative_to(TREE)}:{self.line}"


def sources() -> list[Path]:
    return sorted(p for root, name in ROOTS.items() for p in (TREE / root / name).rglob("*.py"))


def module_of(file: Path) -> str:
    parts = file.relative_to(TREE).with_suffix("").parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(file: Path) -> Iterator[Import]:
    tree = ast.parse(file.read_text("utf-8"), str(file))
    typing_only = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    later = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        at_import = node not in later and node not in typing_only
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name, (), at_import)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            names = tuple(alias.name for alias in node.names)
            yield Import(file, node.lineno, node.module or "", names, at_import)


ALL = [i for file in sources() for i in imports_of(file)]


def is_ours(target: str) -> bool:
    return target.split(".")[0] in ROOTS.values()


def package_of(module: str) -> str:
    """`paretron.plan.cost` -> `paretron.plan`; the two other roots are one package each."""
    parts = module.split(".")
    if parts[0] != "paretron" or module == "paretron.__main__":
        return parts[0]
    return ".".join(parts[:2])


def is_allowed(package: str, target: str) -> bool:
    parents = {".".join(target.split(".")[:n]) for n in range(1, target.count(".") + 2)}
    return any(
        allowed == target if allowed == "paretron" else allowed in parents
        for allowed in MAY_IMPORT[package]
    )


def wrong_arrows(found: list[Import]) -> list[str]:
    out = []
    for i in found:
        if not is_ours(i.target):
            continue
        package = package_of(module_of(i.file))
        # `from paretron import run` names a module, `from paretron import __version__` does not.
        whole = [f"{i.target}.{n}" for n in i.names] if i.target in ROOTS.values() else []
        modules = [m for m in whole if (module_file(m)).exists()] or [i.target]
        out += [
            f"{i.where}: {package} -> {m}"
            for m in modules
            if package_of(m) != package and not is_allowed(package, m)
        ]
    return out


def module_file(module: str) -> Path:
    root = next(r for r, name in ROOTS.items() if name == module.split(".")[0])
    base = TREE / root / Path(*module.split("."))
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


def test_arrows_point_down() -> None:
    assert len(ALL) > 300
    assert wrong_arrows(ALL) == []


@pytest.mark.parametrize(
    ("importer", "target"),
    [
        ("toolkit/paretron/surgery/x.py", "paretron.distill.loop"),
        ("toolkit/paretron/distill/x.py", "paretron.surgery"),
        ("toolkit/paretron/families/x.py", "paretron.artifacts.reader"),
        ("toolkit/paretron/artifacts/x.py", "paretron.cli"),
        ("toolkit/paretron/run/x.py", "paretron_exporters.hf"),
        ("toolkit/paretron/run/x.py", "paretron_profiling.engines.vllm"),
        ("exporters/paretron_exporters/x.py", "paretron_profiling.schema"),
        ("profiling/paretron_profiling/x.py", "paretron.evaluate.perplexity"),
    ],
)
def test_a_wrong_arrow_is_seen(importer: str, target: str) -> None:
    assert wrong_arrows([Import(TREE / importer, 1, target, (), True)])


def test_every_package_has_its_arrows_stated() -> None:
    packages = {package_of(module_of(file)) for file in sources()}
    assert packages - set(MAY_IMPORT) == set()


def test_nothing_private_crosses_a_package() -> None:
    assert [
        f"{i.where}: {name}"
        for i in ALL
        for name in i.names
        if is_ours(i.target)
        and package_of(i.target) != package_of(module_of(i.file))
        and name.startswith("_")
        and not name.startswith("__")
    ] == []


def test_an_engine_is_imported_in_one_file_and_only_when_used() -> None:
    files: dict[tuple[str, str], set[str]] = {}
    for i in ALL:
        engine = i.target.split(".")[0]
        if engine in ENGINES:
            root = i.file.relative_to(TREE).parts[0]
            files.setdefault((engine, root), set()).add(str(i.file.relative_to(TREE)))
            # A worker is a program of its own, run by the interpreter that has the engine.
            assert not i.at_import or i.file.stem.endswith("_worker"), i.where
    assert {key: sorted(found) for key, found in files.items() if len(found) > 1} == {}


def test_every_third_party_import_is_declared() -> None:
    project = tomllib.loads((TREE / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    lines = [*project["dependencies"], *(line for extra in extras for line in extra)]
    declared = {line.split(">=")[0].split("[")[0].strip() for line in lines}
    wanted = {
        i.target.split(".")[0]: i.where
        for i in ALL
        if not is_ours(i.target) and i.target.split(".")[0] not in sys.stdlib_module_names
    }
    assert {n: w for n, w in wanted.items() if DISTRIBUTION.get(n, n) not in declared} == {}


@pytest.mark.parametrize("module", LIGHT)
def test_a_light_module_brings_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
