"""`paretron inspect`: what a checkpoint is, from its config and headers."""

from __future__ import annotations

from typing import Any

from paretron.cli import options as o
from paretron.cli.output import bytes_text, say_json


def inspect(model: o.ModelFolder, as_json: o.Json = False, verbose: o.Verbose = False) -> None:
    """Show a checkpoint's family, axes, counts and what of it can be pruned."""
    from paretron.artifacts.reader import Checkpoint
    from paretron.plan.cost import model_facts

    checkpoint = Checkpoint.open(model)
    facts = model_facts(checkpoint.config, dtype=checkpoint.dtype)
    found: dict[str, Any] = {
        "family": checkpoint.family.model_type,
        "architecture": checkpoint.family.architecture,
        "tied": bool(checkpoint.config.get("tie_word_embeddings", False)),
        "tensors": len(checkpoint.entries),
        "files": sorted({e.file.name for e in checkpoint.entries.values()}),
        "tokenizer": (model / "tokenizer.json").is_file(),
        "prunable": ["hidden", "ffn", "heads", "kv_heads", "layers"],
    } | facts.as_json()
    if as_json:
        say_json(found)
        return
    size = facts.sizes
    print(f"{model}: {found['architecture']} ({facts.dtype}), headers agree with the table")
    print(f"  parameters     {facts.params} ({facts.non_embedding_params} without embeddings)")
    print(f"  weights        {bytes_text(facts.weight_bytes)} in {len(found['files'])} file(s)")
    print(f"  KV cache       {bytes_text(facts.kv_bytes_per_token)} a token")
    print("  axes           " + ", ".join(f"{axis} {n}" for axis, n in size.items()))
    print(f"  embeddings     {'tied' if found['tied'] else 'untied'}")
    print(f"  tokenizer      {'here' if found['tokenizer'] else 'missing'}")
    print("  can be pruned  " + ", ".join(found["prunable"]))
