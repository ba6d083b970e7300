"""The gates of portable ONNX graphs: weights, then plain ONNX Runtime on real prompts."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paretron.artifacts.reader import Checkpoint
from paretron.errors import Code, ParetronError, Problem
from paretron.evaluate.parity import (
    BOUNDS,
    Check,
    Logits,
    ParityReport,
    check_names,
    check_weights,
    compare,
    observe,
    require,
    seeded_prompts,
)
from paretron.families import expected_tensors
from paretron_exporters.onnx_file import Graph, Initialiser, read_graph
from paretron_exporters.onnx_gates import check_versions
from paretron_exporters.onnx_portable import GRAPHS
from paretron_exporters.transformers_engine import observe_transformers

_CACHE = ".past_key_values."


def prove(checkpoint: Checkpoint, folder: Path) -> ParityReport:
    """Levels L0 to L4 of both graphs against their source; raises at the first that fails."""
    what = (f"source {checkpoint.dtype}", "portable onnx float32")
    checks: list[Check] = []
    for name in GRAPHS:
        graph = read_graph(folder / f"{name}.onnx", constants=True)
        pairs = list(_pairs(checkpoint, graph))
        checks += [
            check_versions(graph),
            check_weights(((n, own, found) for n, own, found, _ in pairs), bound=0.0, about=name),
            check_names(
                {i.name: i.shape for *_, i in pairs if i is not None},
                {i.name: i.shape for i in graph.initialisers.values() if not _derived(i)},
            ),
        ]
        require(ParityReport(*what, tuple(checks)))
    prompts = seeded_prompts(checkpoint.config)
    reference = observe_transformers(checkpoint.path, prompts)
    candidate = observe(OrtEngine(folder), prompts)
    report = ParityReport(
        f"{what[0]} in {reference.engine}",
        f"{what[1]} in {candidate.engine}",
        (*checks, *compare(reference, candidate, bounds=BOUNDS["float32"])),
    )
    require(report)
    return report


def _derived(initialiser: Initialiser) -> bool:
    """Whether a weight is none of the checkpoint's: rotary frequencies, and small constants."""
    return "inv_freq" in initialiser.name or sum(d > 1 for d in initialiser.shape) == 0


def _pairs(
    checkpoint: Checkpoint, graph: Graph
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, Initialiser | None]]:
    """(name, the checkpoint's tensor in float32, what the graph has of it, where) for each.

    A graph has most weights transposed and under numbers for names, so they are found by their
    content; one that is nowhere is held against the nearest of its shape.
    """
    named = {_digest(i.read()): i for i in graph.initialisers.values()}
    for name in expected_tensors(checkpoint.family, checkpoint.config):
        own = checkpoint.read(name).float()
        whole = own + (checkpoint.family.norm_offset if name.endswith("norm.weight") else 0.0)
        for form in (own, own.t().contiguous() if own.dim() == 2 else whole, whole):
            initialiser = named.get(_digest(form))
            if initialiser is not None:
                yield name, form, initialiser.read(), initialiser
                break
        else:
            yield name, own, _nearest(own, graph), None


def _nearest(own: torch.Tensor, graph: Graph) -> torch.Tensor:
    nearest = torch.empty(0)
    least = float("inf")
    for initialiser in graph.initialisers.values():
        found = initialiser.read()
        for form in (found, found.t()) if found.dim() == 2 else (found,):
            if form.shape == own.shape and float((form - own).abs().max()) < least:
                nearest, least = form, float((form - own).abs().max())
    return nearest


def _digest(tensor: torch.Tensor) -> tuple[tuple[int, ...], bytes]:
    return tuple(tensor.shape), hashlib.sha256(tensor.contiguous().numpy().tobytes()).digest()


class OrtEngine:
    """A folder with the two graphs in ONNX Runtime, on the CPU."""

    name = "onnxruntime float32"

    def __init__(self, folder: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._prefill, self._decode = (
                onnxruntime.InferenceSession(
                    str(folder / f"{name}.onnx"), options, providers=["CPUExecutionProvider"]
                )
                for name in GRAPHS
            )
        except Exception as error:  # of classes that its binding makes
            raise _reload_error(error) from error

    def start(self) -> _Session:
        """An empty sequence."""
        gc.collect()
        return _Session(self._prefill, self._decode)


class _Session:
    def __init__(self, prefill: Any, decode: Any) -> None:
        self._prefill, self._decode = prefill, decode
        self._cache: dict[str, Any] = {}
        self._length = 0

    def feed(self, ids: Sequence[int]) -> Logits:
        """Append tokens, the first of a sequence at once; logits (len(ids), vocab)."""
        if not self._length:
            return self._run(self._prefill, ids)
        return np.concatenate([self._run(self._decode, [token]) for token in ids])

    def _run(self, session: Any, ids: Sequence[int]) -> Logits:
        positions = np.arange(self._length, self._length + len(ids), dtype=np.int64)[None]
        feed = {"input_ids": np.array([list(ids)], dtype=np.int64), "position_ids": positions}
        if session is self._decode:
            feed |= self._cache
        try:
            values = session.run(None, feed)
        except Exception as error:  # of classes that its binding makes
            raise _reload_error(error) from error
        out: Mapping[str, Any] = dict(
            zip((o.name for o in session.get_outputs()), values, strict=True)
        )
        self._cache = {n.replace("output", "input", 1): v for n, v in out.items() if _CACHE in n}
        self._length += len(ids)
        logits: Logits = out["logits"][0]
        return logits


def _reload_error(error: Exception) -> ParetronError:
    line = (str(error).splitlines() or [""])[0]
    return ParetronError(
        Problem(Code.GATE_RELOAD, f"onnxruntime cannot run the export: {line[:300]}")
    )
