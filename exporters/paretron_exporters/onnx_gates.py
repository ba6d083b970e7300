"""The gates of an ONNX export: its weights and tables, then ONNX Runtime GenAI on real prompts."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch

from paretron.artifacts.jsonfile import read_object
from paretron.artifacts.reader import Checkpoint
from paretron.errors import Code
from paretron.evaluate.parity import (
    BOUNDS,
    GREEDY_STEPS,
    Check,
    Observation,
    ParityReport,
    check_names,
    check_weights,
    compare,
    observe,
    require,
    seeded_prompts,
)
from paretron_exporters.genai import GenaiEngine
from paretron_exporters.onnx_weights import (
    ROPE_TABLES,
    Graph,
    expected_initialisers,
    read_graph,
    weight_pairs,
)
from paretron_exporters.transformers_engine import TransformersEngine

MAX_OPSET, MAX_IR = 22, 10  # the ONNX Runtime of serving containers lags behind
BOUND = BOUNDS["float32"]


def prove(checkpoint: Checkpoint, folder: Path) -> ParityReport:
    """Levels L0 to L4 of a built graph against its source; raises at the first that fails."""
    graph = read_graph(folder / "model.onnx")
    what = (f"source {checkpoint.dtype}", "onnx float32")
    versions, names = check_versions(graph), check_graph_names(checkpoint, graph)
    require(ParityReport(*what, (versions, names)))
    matches = expected_initialisers(checkpoint)
    weights = check_weights(weight_pairs(checkpoint, graph, matches), bound=0.0)
    require(ParityReport(*what, (weights,)))
    prompts = seeded_prompts(checkpoint.config)
    source = TransformersEngine(checkpoint.path)
    rotary = check_weights(_rope_pairs(source, graph), bound=BOUND.max_abs, about="rotary tables")
    require(ParityReport(*what, (rotary,)))
    reference = observe(source, prompts)
    del source
    gc.collect()
    engine = GenaiEngine(folder, max_length=max(map(len, prompts)) + GREEDY_STEPS)
    candidate = observe(engine, prompts)
    report = ParityReport(
        f"{what[0]} in {reference.engine}",
        f"{what[1]} in {candidate.engine}",
        (
            versions,
            names,
            weights,
            rotary,
            *compare(reference, candidate, bounds=BOUND),
            check_own_loop(engine, candidate, stop_ids=_stop_ids(folder)),
        ),
    )
    require(report)
    return report


def check_versions(graph: Graph) -> Check:
    """L0: the graph's format is not too new for the servers that load it."""
    return Check(
        "L0",
        "opset and IR version",
        graph.opset <= MAX_OPSET and graph.ir_version <= MAX_IR,
        {"opset": graph.opset, "ir_version": graph.ir_version},
        {"opset": MAX_OPSET, "ir_version": MAX_IR},
        worst="model.onnx",
    )


def check_graph_names(checkpoint: Checkpoint, graph: Graph) -> Check:
    """L0: the graph holds every weight of the checkpoint, joined as expected, and no other."""
    return check_names(
        {n: m.shape for n, m in expected_initialisers(checkpoint).items()}
        | {
            n: graph.initialisers[n].shape
            for n in chain(*ROPE_TABLES.values())
            if n in graph.initialisers
        },
        {n: i.shape for n, i in graph.initialisers.items()},
    )


def _rope_pairs(
    source: TransformersEngine, graph: Graph
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """The rotary tables for every position of the context, by transformers and in the graph.

    Prompts cannot tell: a wrong scaling of the slow channels shows at far positions only.
    """
    for attention, names in ROPE_TABLES.items():
        if names[0] not in graph.initialisers:
            continue
        positions, half = graph.initialisers[names[0]].shape
        of_layers = {"layer_type": attention} if attention else {}
        with torch.inference_mode():
            tables = source.model.model.rotary_emb(
                torch.zeros(1, 1, 1), torch.arange(positions)[None], **of_layers
            )  # each (1, positions, 2 * half)
        for name, table in zip(names, tables, strict=True):
            yield name, table[0, :, :half], graph.initialisers[name].read()


def check_own_loop(engine: GenaiEngine, observed: Observation, *, stop_ids: set[int]) -> Check:
    """L4: the engine's own generation, by its config, gives the tokens that its logits say.

    It may end early, at a stop token.
    """
    equal, worst = 0, ""
    for k, (prompt, greedy) in enumerate(zip(observed.prompts, observed.greedy, strict=True)):
        tokens = engine.generate(prompt, steps=len(greedy))
        end = len(tokens)
        stopped = end == len(greedy) or bool(stop_ids & set(greedy[max(0, end - 1) : end + 1]))
        if tokens == greedy[:end] and stopped:
            equal += 1
        else:
            worst = worst or f"prompt {k + 1} of {len(prompt)} tokens"
    total = len(observed.prompts)
    return Check(
        "L4", "the engine's own greedy loop", equal == total, {"prompts": total, "equal": equal},
        {}, worst=worst,
    )  # fmt: skip


def _stop_ids(folder: Path) -> set[int]:
    model = read_object(folder / "genai_config.json", code=Code.GATE_RELOAD)["model"]
    stop = model["eos_token_id"]
    return set(stop) if isinstance(stop, list) else {stop}
