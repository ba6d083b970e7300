"""What must hold of a Triton model repository before a server sees it.

Triton's own protobuf reads `config.pbtxt`, so unknown fields, enums and types are found as the
server would find them; the rest is what no schema can see: names, folders, keys, paths. This is
the only file that imports tritonclient.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from paretron.errors import Code, ParetronError, Problem
from paretron_exporters.triton_repository import MOUNT, NAMES, STARTED_FROM, WEIGHTS, Backend

INSTALL = 'pip install "paretron[triton]"'
FLOORS = {"tritonclient": "2.60", "grpcio": "1.63"}
# What may be said to an engine; both engines refuse, or ignore, a key that they do not know.
KEYS: Mapping[str, frozenset[str]] = {
    "model.json": frozenset({
        "model", "dtype", "tensor_parallel_size", "pipeline_parallel_size", "max_model_len",
        "max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization",
    }),
    "model.yaml": frozenset({
        "model", "backend", "tensor_parallel_size", "pipeline_parallel_size", "max_batch_size",
        "max_num_tokens", "max_seq_len", "kv_cache_config", "cuda_graph_config", "triton_config",
    }),
}  # fmt: skip
_TRITON_BACKEND: Mapping[Backend, str] = {"trtllm": "python", "vllm": "vllm", "onnx": "python"}
_NEEDED: Mapping[Backend, str] = {
    "trtllm": "config.json",
    "vllm": "config.json",
    "onnx": "genai_config.json",
}


def lint(repository: Path, *, backend: Backend) -> list[Problem]:
    """Everything wrong with a repository of one model; GATE_RELOAD each, the file named."""
    name = NAMES[backend]
    folders = sorted(p.name for p in repository.iterdir() if p.is_dir())
    if folders != [name]:
        return [
            _bad(".", f"folders {', '.join(folders) or 'none'} where a server looks for {name}")
        ]
    return [
        *_config(repository, name, backend),
        *_version(repository / name, name, backend),
        *_links(repository),
    ]


def read_config(text: str) -> Any:
    """A ModelConfig from the text of a config.pbtxt; GATE_RELOAD when protobuf refuses it.

    OPTIONAL_MISSING without tritonclient.
    """
    try:
        from google.protobuf import text_format
        from tritonclient.grpc import model_config_pb2
    except ImportError as error:
        cause = f"tritonclient cannot be imported: {error}"
        raise ParetronError(Problem(Code.OPTIONAL_MISSING, cause, fix=INSTALL)) from error
    try:
        return text_format.Parse(text, model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise ParetronError(Problem(Code.GATE_RELOAD, str(error), where="config.pbtxt")) from error


def _config(repository: Path, name: str, backend: Backend) -> Iterator[Problem]:
    where = f"{name}/config.pbtxt"
    path = repository / where
    if not path.is_file():
        yield _bad(where, "no such file")
        return
    try:
        config = read_config(path.read_text("utf-8"))
    except ParetronError as error:
        if error.problems[0].code is not Code.GATE_RELOAD:
            raise
        yield from (_bad(where, problem.cause) for problem in error.problems)
        return
    if config.name != name:
        yield _bad(where, f"name {config.name!r}, but the folder is {name!r}")
    if config.backend != _TRITON_BACKEND[backend]:
        yield _bad(where, f"backend {config.backend!r} instead of {_TRITON_BACKEND[backend]!r}")
    if config.max_batch_size:
        yield _bad(where, f"max_batch_size {config.max_batch_size}: the engine makes its batches")
    for key, value in config.parameters.items():
        yield from _paths(repository, where, {key: value.string_value})


def _version(model: Path, name: str, backend: Backend) -> Iterator[Problem]:
    versions = sorted(p.name for p in model.iterdir() if p.is_dir())
    if versions != ["1"]:
        yield _bad(name, f"version folders {', '.join(versions) or 'none'} instead of 1")
        return
    start = STARTED_FROM[backend]
    where = f"{name}/1/{start}"
    if not (model / "1" / start).is_file():
        yield _bad(where, "no such file")
    elif start in KEYS:
        yield from _arguments(model.parent, where)
    needed = f"{WEIGHTS}/{_NEEDED[backend]}"
    if not (model / "1" / needed).is_file():
        yield _bad(f"{name}/1/{needed}", "no such file")


def _arguments(repository: Path, where: str) -> Iterator[Problem]:
    text = (repository / where).read_text("utf-8")
    try:
        values = json.loads(text) if where.endswith(".json") else YAML(typ="safe").load(text)
    except (ValueError, YAMLError) as error:
        yield _bad(where, f"cannot be read: {' '.join(str(error).split())[:200]}")
        return
    if not isinstance(values, dict):
        yield _bad(where, "not a mapping of arguments")
        return
    allowed = KEYS[PurePosixPath(where).name]
    for key in sorted(set(values) - allowed):
        yield _bad(where, f"unknown key {key!r}; known: {', '.join(sorted(allowed))}")
    if "model" not in values:
        yield _bad(where, "no model")
    elif not str(values["model"]).startswith("/"):
        # A name without a slash in front is looked up on a hub, or in the server's own folder.
        yield _bad(where, f"model {values['model']!r} is no path on the server")
    yield from _paths(repository, where, values)


def _paths(repository: Path, where: str, values: Mapping[str, Any]) -> Iterator[Problem]:
    """Absolute paths that no server would find: outside of the mount, or not in the repository."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _paths(repository, where, value)
        if not isinstance(value, str) or not value.startswith("/"):
            continue
        path = PurePosixPath(os.path.normpath(value))
        if not path.is_relative_to(MOUNT):
            yield _bad(where, f"{key} is {value}, which is outside of {MOUNT}")
        elif not (repository / path.relative_to(MOUNT)).exists():
            yield _bad(where, f"{key} is {value}, and there is nothing in the repository")


def _links(repository: Path) -> Iterator[Problem]:
    for path in sorted(repository.rglob("*")):
        if path.is_symlink():
            yield _bad(str(path.relative_to(repository)), "a link, which a mount would not follow")


def _bad(where: str, cause: str) -> Problem:
    return Problem(Code.GATE_RELOAD, cause, where=where)
