"""The width cut of tests/benchmarks/surgery.py by Torch-Pruning, run by an interpreter that has it.

python surgery_torch_pruning.py MODEL OUT HIDDEN FFN

The model is loaded in bf16, its dependency graph is traced on two tokens, the first channels and
neurons beyond the target go, and it is saved as transformers saves it.
"""

from __future__ import annotations

import sys

import torch
import torch_pruning  # type: ignore[import-not-found]
from torch_pruning.pruner import function  # type: ignore[import-not-found]
from transformers import AutoModelForCausalLM


def main() -> None:
    """Load, cut, save."""
    model_folder, out, hidden, ffn = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(True)  # the graph is traced through autograd
    model.config.use_cache = False
    tokens = torch.tensor([[1, 2]])
    graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=tokens)
    for layer in model.model.layers:
        gone = list(range(model.config.intermediate_size - ffn))
        prune = function.prune_linear_out_channels
        graph.get_pruning_group(layer.mlp.gate_proj, prune, idxs=gone).prune()
    gone = list(range(model.config.hidden_size - hidden))
    prune = function.prune_embedding_out_channels
    graph.get_pruning_group(model.model.embed_tokens, prune, idxs=gone).prune()
    model.config.hidden_size, model.config.intermediate_size = hidden, ffn
    model.save_pretrained(out, max_shard_size="5GB")


if __name__ == "__main__":
    main()
