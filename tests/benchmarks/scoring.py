"""What scoring costs beside a forward pass without lm_head, and what others' ways cost: JSON.

python tests/benchmarks/scoring.py --torch-pruning OTHER_VENV/bin/python

Scoring, the plain pass and a naive implementation (hooks that keep every activation, then the nine
aggregations) take turns in one process, so that what else the machine does meets all of them;
ratios are of pairs that ran one after the other. Torch-Pruning's importance needs a backward pass
for its data-driven criterion and none for weight magnitude; both are timed in its own interpreter.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from paretron.families import FAMILIES
from paretron.importance.collect import batches_of, observe
from paretron.importance.executor import Batch, LayerStack
from paretron.importance.statistics import AGGREGATIONS, aggregate

PEER = Path(__file__).with_name("torch_pruning_peer.py")


def random_llama(shape: dict[str, int]) -> PreTrainedModel:
    """A Llama of random weights."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape)).eval()


def plain(stack: LayerStack, batches: list[Batch]) -> None:
    """The reference: the base model's own forward pass."""
    with torch.no_grad():
        for batch in batches:
            stack.model.model(input_ids=batch.ids_BT, use_cache=False)


def scoring(stack: LayerStack, batches: list[Batch]) -> None:
    """Everything that `paretron score` takes from its one pass."""
    observed = observe(stack, stack.model.config.to_dict(), batches)
    for statistics_ in observed.axes.values():
        for batch, sequence in itertools.product(AGGREGATIONS, AGGREGATIONS):
            aggregate(statistics_, batch=batch, sequence=sequence)
    observed.influence()


def naive(stack: LayerStack, batches: list[Batch]) -> None:
    """Hooks keep every activation; nine aggregations are computed afterwards, as formulas stand."""
    seen: dict[str, list[torch.Tensor]] = {}
    hooks = []
    for name, module in stack.model.model.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            hooks.append(
                module.register_forward_pre_hook(
                    lambda _m, args, n=name: seen.setdefault(n, []).append(args[0].clone())
                )
            )
        elif name.endswith("norm"):
            hooks.append(
                module.register_forward_hook(
                    lambda _m, _a, out, n=name: seen.setdefault(n, []).append(out.clone())
                )
            )
    plain(stack, batches)
    for hook in hooks:
        hook.remove()
    heads = stack.model.config.num_attention_heads
    for name, parts in seen.items():
        values = torch.cat(parts)
        if name.endswith("o_proj"):
            values = values.unflatten(-1, (heads, -1)).norm(dim=-1)
        values = values.abs()
        for over_positions in (values.mean(1), values.norm(dim=1), values.var(1, correction=0)):
            over_positions.mean(0), over_positions.norm(dim=0), over_positions.var(0, correction=0)


def timed(run: Callable[[LayerStack, list[Batch]], None], *given: Any) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    run(*given)
    return time.perf_counter() - wall, time.process_time() - cpu


def summary(ratios: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"median": middle, "quarter": low, "three_quarters": high}


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser()
    for name, default in (
        ("hidden", 768), ("layers", 14), ("ffn", 2048), ("heads", 12), ("kv-heads", 4),
        ("vocab", 8192), ("seq-len", 512), ("samples", 4), ("micro-batch", 4), ("repeats", 9),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--torch-pruning", type=Path, help="an interpreter that has it")
    parser.add_argument("--naive", type=int, default=3, help="how often the naive way takes a turn")
    a = parser.parse_args()
    if min(a.repeats, a.naive) < 2:
        parser.error("a spread needs --repeats and --naive of at least 2")
    shape = {
        "hidden_size": a.hidden, "num_hidden_layers": a.layers, "intermediate_size": a.ffn,
        "num_attention_heads": a.heads, "num_key_value_heads": a.kv_heads, "vocab_size": a.vocab,
    }  # fmt: skip
    model = random_llama(shape)
    stack = LayerStack(model, FAMILIES["llama"])
    generator = torch.Generator().manual_seed(1)
    windows = list(torch.randint(0, a.vocab, (a.samples, a.seq_len), generator=generator))
    batches = list(batches_of(windows, a.micro_batch))
    for run in (plain, scoring):
        run(stack, batches)  # libraries warm up
    ways = {"scoring": scoring, "naive": naive}
    pairs: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
    for k in range(a.repeats):
        for name, run in ways.items():
            if name == "naive" and k >= a.naive:
                continue
            # Which of a pair goes first alternates: neither always finds the warmer machine.
            order = [plain, run] if k % 2 else [run, plain]
            took = {f: timed(f, stack, batches) for f in order}
            wall, cpu = (took[run][i] / took[plain][i] for i in (0, 1))
            pairs[name].append((wall, cpu, took[plain][0]))
    report: dict[str, Any] = {
        "shape": shape | {"parameters": sum(p.numel() for p in model.parameters())},
        "tokens": sum(len(w) for w in windows),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "plain_seconds": statistics.median(p[2] for p in pairs["scoring"]),
    }
    for name, found in pairs.items():
        report[f"{name}_over_plain"] = {
            "wall": summary([p[0] for p in found]), "cpu": summary([p[1] for p in found]),
        }  # fmt: skip
    if a.torch_pruning is not None:
        given = json.dumps({"shape": shape, "seq_len": a.seq_len, "samples": a.samples,
                            "micro_batch": a.micro_batch})  # fmt: skip
        done = subprocess.run(
            [a.torch_pruning, PEER, given], capture_output=True, text=True, check=True
        )
        report["torch_pruning"] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
