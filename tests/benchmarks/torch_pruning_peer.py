"""Torch-Pruning's importance of a random Llama, against its plain forward pass: JSON.

Run by scoring.py with an interpreter that has torch-pruning: `torch_pruning_peer.py SHAPE_JSON`.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import torch
import torch_pruning as tp  # type: ignore[import-not-found]
from transformers import AutoConfig, AutoModelForCausalLM

REPEATS = 3


def groups_of(model: torch.nn.Module, ids: torch.Tensor) -> list[Any]:
    """Every coupled group of channels that Torch-Pruning finds."""
    graph = tp.DependencyGraph().build_dependency(model, example_inputs={"input_ids": ids})
    return list(graph.get_all_groups(ignored_layers=[model.lm_head], root_module_types=[
        torch.nn.Linear]))  # fmt: skip


def main() -> None:
    """Median seconds of the plain pass, of magnitude and of first-order Taylor importance."""
    given = json.loads(sys.argv[1])
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **given["shape"], use_cache=False)
    model = AutoModelForCausalLM.from_config(config).eval()
    shape = (given["samples"], given["seq_len"])
    batches = torch.randint(0, given["shape"]["vocab_size"], shape).split(given["micro_batch"])
    begun = time.process_time()
    groups = groups_of(model, batches[0][:1, :8])
    found: dict[str, Any] = {"graph_cpu_seconds": time.process_time() - begun}
    took: dict[str, list[float]] = {"plain": [], "magnitude": [], "taylor": []}
    for _ in range(REPEATS):
        begun = time.process_time()
        with torch.no_grad():
            for ids in batches:
                model.model(input_ids=ids)
        took["plain"].append(time.process_time() - begun)
        begun = time.process_time()
        for group in groups:
            tp.importance.GroupMagnitudeImportance()(group)
        took["magnitude"].append(time.process_time() - begun)
        begun = time.process_time()
        model.zero_grad()
        for ids in batches:
            model(input_ids=ids, labels=ids).loss.backward()
        for group in groups:
            tp.importance.GroupTaylorImportance()(group)
        took["taylor"].append(time.process_time() - begun)
    medians = {name: statistics.median(values) for name, values in took.items()}
    found |= {
        "version": tp.__version__ if "__version__" in dir(tp) else "",
        "groups": len(groups),
        "plain_cpu_seconds": medians["plain"],
        "magnitude_over_plain_cpu": medians["magnitude"] / medians["plain"],
        "taylor_over_plain_cpu": medians["taylor"] / medians["plain"],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
