"""Removing each block of n layers, against the naive way of one whole pass for each: JSON.

python tests/benchmarks/depth.py --layers 32 --block 4

Both ways run the same layers through the same executor on the same batches and must agree. They
take turns; the ratio is that of pairs. Layer evaluations are counted by hooks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from paretron.families import FAMILIES
from paretron.importance.collect import batches_of
from paretron.importance.depth import Evaluator, block_removals
from paretron.importance.executor import Batch, LayerStack
from paretron.importance.measures import LossMeasure


@torch.no_grad()
def naive(stack: LayerStack, batches: list[Batch], block: int) -> list[float]:
    """One pass for the whole model and one without each block."""
    layers, losses = range(len(stack)), []
    for start in (None, *range(len(stack) - block + 1)):
        gone = () if start is None else range(start, start + block)
        total, targets = 0.0, 0
        for batch in batches:
            prepared = stack.prepare(batch.ids_BT)
            hidden = prepared.hidden_BTD
            for i in layers:
                if i not in gone:
                    hidden = stack.run_layer(i, prepared, hidden)
            total += stack.loss_sum(hidden, batch.targets())
            targets += batch.num_targets
        losses.append(total / targets)
    return losses


def shared(stack: LayerStack, batches: list[Batch], block: int) -> list[float]:
    """The prefix is run once."""
    found = block_removals(Evaluator(stack, LossMeasure(batches)), block_sizes=(block,))
    return [found.baseline, *found.blocks[block]]


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser()
    for name, default in (
        ("layers", 32), ("block", 4), ("hidden", 64), ("ffn", 160), ("samples", 4),
        ("seq-len", 128), ("micro-batch", 4), ("repeats", 5),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", hidden_size=a.hidden, num_hidden_layers=a.layers, intermediate_size=a.ffn,
        num_attention_heads=4, num_key_value_heads=2, vocab_size=512,
    )  # fmt: skip
    stack = LayerStack(AutoModelForCausalLM.from_config(config).eval(), FAMILIES["llama"])
    windows = list(torch.randint(0, 512, (a.samples, a.seq_len)))
    batches = list(batches_of(windows, a.micro_batch))
    rows = [0]
    hooks = [
        layer.register_forward_hook(lambda _m, _a, out: rows.__setitem__(0, rows[0] + len(out)))
        for layer in stack.layers
    ]
    counts, losses = {}, {}
    for name, run in (("naive", naive), ("shared", shared)):
        rows[0] = 0
        losses[name] = run(stack, batches, a.block)
        counts[name] = rows[0] / a.samples
    for hook in hooks:
        hook.remove()
    worst = max(abs(x - y) for x, y in zip(losses["naive"], losses["shared"], strict=True))
    wall, cpu, seconds = [], [], {"naive": [0.0], "shared": [0.0]}
    for k in range(a.repeats):
        took = {}
        ways = [("naive", naive), ("shared", shared)]
        for name, run in ways if k % 2 else reversed(ways):
            begun = time.perf_counter(), time.process_time()
            run(stack, batches, a.block)
            took[name] = time.perf_counter() - begun[0], time.process_time() - begun[1]
            seconds[name].append(took[name][0])
        wall.append(took["shared"][0] / took["naive"][0])
        cpu.append(took["shared"][1] / took["naive"][1])
    report = {
        "layers": a.layers, "block": a.block, "tokens": a.samples * a.seq_len,
        "hidden": a.hidden, "threads": torch.get_num_threads(), "torch": torch.__version__,
        "layer_evaluations": counts,
        "evaluations_bound": (counts["naive"] - a.layers) / 2 + a.layers,
        "largest_difference_of_losses": worst,
        "naive_seconds": statistics.median(seconds["naive"][1:]),
        "wall_ratio": {"median": statistics.median(wall), "all": sorted(wall)},
        "cpu_ratio": {"median": statistics.median(cpu), "all": sorted(cpu)},
    }  # fmt: skip
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
