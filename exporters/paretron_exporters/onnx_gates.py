"""The gates of an ONNX export: its weights and tables, then ONNX Runtime GenAI on real prompts."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
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
    Logits,
    Observation,
    ParityReport,
    Prompt,
    check_cached,
    check_greedy,
    check_logits,
    check_names,
    check_weights,
    observe,
    require,
    seeded_prompts,
)
from paretron_exporters.genai import GenaiEngine
from paretron_exporters.onnx_blocks import check_blocks, restored, stored_shapes
from paretron_exporters.onnx_file import Graph, read_graph
from paretron_exporters.onnx_precision import Precision
from paretron_exporters.onnx_weights import (
    ROPE_TABLES,
    Match,
    expected_initialisers,
    weight_pairs,
)
from paretron_exporters.transformers_engine import TransformersEngine

MAX_OPSET, MAX_IR = 22, 10  # the ONNX Runtime of serving containers lags behind


def prove(checkpoint: Checkpoint, folder: Path, precision: Precision) -> ParityReport:
    """Levels L0 to L4 of a built graph against its source; raises at the first that fails.

    A graph for a GPU runs on the CPU here, with the same operators, where the CPU has them all;
    otherwise L0 and L1 alone are measured.
    """
    graph = read_graph(folder / "model.onnx")
    what = (f"source {checkpoint.dtype}", f"onnx {precision.name} for {precision.device}")
    matches = expected_initialisers(checkpoint, shared=precision.bits is None)
    checks = [check_versions(graph), check_graph_names(matches, graph, precision)]
    require(ParityReport(*what, tuple(checks)))
    checks += _check_weights(checkpoint, graph, matches, precision)
    require(ParityReport(*what, tuple(checks)))
    source = TransformersEngine(checkpoint.path)
    bound = max(BOUNDS["float32"].max_abs, torch.finfo(getattr(torch, precision.dtype)).eps)
    checks.append(check_weights(_rope_pairs(source, graph), bound=bound, about="rotary tables"))
    require(ParityReport(*what, tuple(checks)))
    if not precision.runs_here:
        return ParityReport(*what, tuple(checks))
    prompts = seeded_prompts(checkpoint.config)
    reference = observe(source, prompts)
    rounded = _observe_rounded(source, graph, matches, precision, prompts)
    del source
    gc.collect()
    engine = GenaiEngine(folder, max_length=max(map(len, prompts)) + GREEDY_STEPS)
    candidate = observe(engine, prompts)
    logits = check_logits(reference, candidate, bounds=precision.bounds)
    checks.append(logits)
    if rounded is not None:
        about = check_logits(rounded, candidate, bounds=precision.own)
        checks.append(replace(about, about="logits of the quantised weights in transformers"))
    checks.append(cached := check_cached(candidate, bounds=precision.own))
    checks += [
        check_greedy(
            reference, candidate, bounds=precision.bounds, error=logits.measured["max_abs"]
        ),
        check_own_loop(
            engine, candidate, stop_ids=_stop_ids(folder), error=cached.measured["max_abs"]
        ),
    ]
    report = ParityReport(
        f"{what[0]} in {reference.engine}", f"{what[1]} in {candidate.engine}", tuple(checks)
    )
    require(report)
    return report


def _check_weights(
    checkpoint: Checkpoint, graph: Graph, matches: Mapping[str, Match], precision: Precision
) -> tuple[Check, ...]:
    """L1: what is kept in floats is the source's, cast; what is not, the nearest to it."""
    kept = {n: m for n, m in matches.items() if precision.bits is None or not m.transposed}
    pairs = weight_pairs(checkpoint, graph, kept, dtype=precision.dtype)
    same = check_weights(pairs, bound=0.0)
    if precision.bits is None:
        return (same,)
    return same, *check_blocks(checkpoint, graph, matches, precision)


def _observe_rounded(
    source: TransformersEngine,
    graph: Graph,
    matches: Mapping[str, Match],
    precision: Precision,
    prompts: Sequence[Prompt],
) -> Observation | None:
    """What transformers computes with the weights that the codes stand for."""
    if precision.bits is None:
        return None
    state = source.model.state_dict()
    head = source.model.get_output_embeddings()
    assert head is not None  # of every causal language model
    # Its own, where it is tied: the embedding is not rounded.
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    state["lm_head.weight"] = head.weight
    for graph_name, match in matches.items():
        if not match.transposed:
            continue
        rows = restored(graph, graph_name, match, bits=precision.bits)
        start = match.first_row
        for name in match.sources:
            target = state["lm_head.weight" if graph_name.startswith("lm_head.") else name]
            count = min(len(rows), len(target) - start)
            target.data[start : start + count] = rows[:count]
            rows = rows[count:]
    return observe(source, prompts)


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


def check_graph_names(matches: Mapping[str, Match], graph: Graph, precision: Precision) -> Check:
    """L0: the graph holds every weight of the checkpoint, joined as expected, and no other."""
    tables = {
        n: graph.initialisers[n].shape
        for n in chain(*ROPE_TABLES.values())
        if n in graph.initialisers
    }
    return check_names(
        stored_shapes(matches, bits=precision.bits) | tables,
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
            yield name, table[0, :, :half], graph.initialisers[name].read().float()


def check_own_loop(
    engine: GenaiEngine, observed: Observation, *, stop_ids: set[int], error: float
) -> Check:
    """L4: the engine's own generation, by its config, gives the tokens that its logits say.

    It may end early, at a stop token. Its loop reads a prompt at once, where it was observed token
    by token; where two logits are closer than twice `error`, what that changes, either is right.
    """
    equal, ties, worst = 0, 0, ""
    for k, (prompt, greedy) in enumerate(zip(observed.prompts, observed.greedy, strict=True)):
        tokens = engine.generate(prompt, steps=len(greedy))
        end = len(tokens)
        step = next((i for i in range(end) if tokens[i] != greedy[i]), None)
        stopped = end == len(greedy) or bool(stop_ids & set(greedy[max(0, end - 1) : end + 1]))
        if step is None and stopped:
            equal += 1
        elif step is not None and _close(
            observed.steps[k][step], greedy[step], tokens[step], error
        ):
            ties += 1
        else:
            worst = worst or f"prompt {k + 1} of {len(prompt)} tokens"
    total = len(observed.prompts)
    return Check(
        "L4",
        "the engine's own greedy loop",
        equal + ties == total,
        {"prompts": total, "equal": equal, "ties": ties},
        {},
        worst=worst,
    )


def _close(logits: Logits, one: int, other: int, error: float) -> bool:
    return float(logits[one] - logits[other]) <= 2 * error


def _stop_ids(folder: Path) -> set[int]:
    model = read_object(folder / "genai_config.json", code=Code.GATE_RELOAD)["model"]
    stop = model["eos_token_id"]
    return set(stop) if isinstance(stop, list) else {stop}
