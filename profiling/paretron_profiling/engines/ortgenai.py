"""ONNX Runtime GenAI in this process; the only file that imports onnxruntime_genai."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

from paretron.artifacts.external import beside
from paretron.artifacts.jsonfile import read_object
from paretron.errors import Code, ParetronError, Problem
from paretron.versions import missing_or_old
from paretron_profiling.engines.engine import (
    EngineSettings,
    Limits,
    own_process_only,
)
from paretron_profiling.schema import OFFLINE, Sample

FLOORS = {"onnxruntime-genai": "0.18"}
INSTALL = 'pip install "paretron[onnx]"'
_SETTINGS = "genai_config.json"


class OrtGenAI:
    """Runs an export of onnxruntime-genai's model builder, with a static KV cache."""

    name = "ortgenai"
    wants = "onnx"
    modes = frozenset({OFFLINE})
    session_bytes = 200 << 20
    largest_batch = 32  # the library refuses more

    def check(self, settings: EngineSettings) -> list[Problem]:
        """Whether the package is here, and whether the recipe asks for what it cannot do."""
        problems = missing_or_old(FLOORS, install=INSTALL)
        problems += own_process_only(settings)
        if settings.dtype is not None:
            problems.append(
                Problem(
                    Code.RECIPE_VALUE,
                    "ortgenai runs the dtype that the ONNX export has",
                    where="profile.engines: ortgenai: dtype",
                    fix="state the dtype at the export instead",
                )
            )
        return problems

    @contextmanager
    def open(
        self, model_dir: Path, *, settings: EngineSettings, limits: Limits
    ) -> Iterator[OrtSession]:
        """Load the ONNX model folder.

        INPUT_UNSAFE_PATH when a graph or its settings name a file outside of the folder, or a link:
        the runtime would follow it.
        """
        import onnxruntime_genai as og

        check_files(model_dir)

        try:
            model = og.Model(str(model_dir))
        except RuntimeError as error:  # og raises nothing more specific
            raise _failure(model_dir, error) from error
        session = OrtSession(og, model, model_dir)
        try:
            yield session
        finally:
            session.close()


class OrtSession:
    """A loaded ONNX model."""

    def __init__(self, og: Any, model: Any, model_dir: Path) -> None:
        self._og, self._model, self._dir = og, model, model_dir

    @property
    def about(self) -> Mapping[str, str]:
        """Versions and device."""
        return {
            "onnxruntime-genai": version("onnxruntime-genai"),
            "device": str(self._model.device_type).lower(),
        }

    @property
    def pid(self) -> int:
        """This process."""
        return os.getpid()

    def generate(self, prompts: Sequence[Sequence[int]], output_len: int) -> Sample:
        """Greedy decoding; the clock runs from the creation of the generator.

        append_tokens runs the prefill, and the first token is chosen from its logits. The end of
        sequence is kept from being chosen (min_length), so that every request runs to the end.
        """
        import numpy as np

        batch = np.array(prompts, dtype=np.int32)
        length = batch.shape[1] + output_len
        try:
            start = perf_counter()
            params = self._og.GeneratorParams(self._model)
            params.set_search_options(
                do_sample=False, batch_size=len(prompts), max_length=length, min_length=length
            )
            generator = self._og.Generator(self._model, params)
            generator.append_tokens(batch)
            times_s = []
            for _ in range(output_len):
                generator.generate_next_token()
                times_s.append(perf_counter() - start)
            tokens = [
                [int(t) for t in generator.get_sequence(i)[batch.shape[1] :]]
                for i in range(len(prompts))
            ]
        except RuntimeError as error:
            raise _failure(self._dir, error) from error
        return Sample.in_lockstep(times_s, tokens=tokens)

    def close(self) -> None:
        """Free the model now: its arena outlives the context otherwise."""
        self._model = None
        gc.collect()


def check_files(model_dir: Path) -> None:
    """Whether every file that the folder's settings and graphs name is a plain one in it."""
    settings = read_object(
        beside(model_dir, _SETTINGS, where=str(model_dir)), code=Code.INPUT_CONFIG
    )
    for name in _filenames(settings):
        graph = beside(model_dir, name, where=str(model_dir / _SETTINGS))
        for location in _locations(graph):
            beside(model_dir, location, where=str(graph))


def _filenames(settings: object) -> Iterator[str]:
    """Every `filename` in genai_config.json, wherever it stands."""
    if isinstance(settings, dict):
        if isinstance(settings.get("filename"), str):
            yield settings["filename"]
        for value in settings.values():
            yield from _filenames(value)
    elif isinstance(settings, list):
        for value in settings:
            yield from _filenames(value)


def _locations(graph: Path) -> set[str]:
    """The files that any tensor of a graph says its values are in, subgraphs and all."""
    try:
        import onnx
    except ImportError as error:
        cause = f"onnx cannot be imported: {error}"
        raise ParetronError(Problem(Code.OPTIONAL_MISSING, cause, fix=INSTALL)) from error
    try:
        model = onnx.load(graph, load_external_data=False)
    except Exception as error:  # of a class of the protobuf library's
        cause = "not an ONNX graph"
        raise ParetronError(Problem(Code.INPUT_CONFIG, cause, where=str(graph))) from error
    nodes = [n for f in model.functions for n in f.node]
    tensors = [*_tensors(model.graph), *_of_nodes(nodes)]
    return {e.value for t in tensors for e in t.external_data if e.key == "location"}


def _tensors(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Sequence[Any]) -> Iterator[Any]:
    for attribute in (a for node in nodes for a in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for graph in (attribute.g, *attribute.graphs):
            if graph.node or graph.initializer or graph.sparse_initializer:
                yield from _tensors(graph)


def _failure(model_dir: Path, error: RuntimeError) -> ParetronError:
    line = (str(error).splitlines() or ["no message"])[0]
    return ParetronError(
        Problem(
            Code.ENGINE,
            f"onnxruntime-genai failed: {line[:300]}",
            where=str(model_dir),
            fix="check the export with `paretron verify`",
        )
    )


ENGINE = OrtGenAI()
