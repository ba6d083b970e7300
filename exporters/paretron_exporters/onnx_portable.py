"""ONNX by transformers' own exporter: graphs of standard operators that any runtime loads.

One graph reads a prompt, the other one token behind it, with the keys and values of those before
as inputs and outputs; both find their weights in one file. One sequence at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paretron.artifacts.reader import Checkpoint
from paretron.errors import Code, Problem
from paretron.families import family_of
from paretron.recipe import Export
from paretron_exporters.onnx_file import share_weights
from paretron_exporters.quiet import quiet, told_of

FLOORS = {"onnx": "1.21", "onnxruntime": "1.24", "onnxscript": "0.7"}
INSTALL = 'pip install "paretron[onnx]"'
# Those whose graphs were seen to give the same logits. Caches of layers that attend in a window
# are traced at the length that they had, and so are experts at the tokens that were theirs.
FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "nemotron", "phi3", "olmo2", "granite", "starcoder2",
    "smollm3",
)  # fmt: skip
ROPE_TYPES = ("default", "linear", "llama3")
OPSET = 22
GRAPHS = ("prefill", "decode")
DATA = "model.onnx.data"
_SAMPLE_LEN = 12  # tokens of the prompt that is traced; other lengths are as good


def unsupported(config: Mapping[str, Any], export: Export) -> list[Problem]:
    """Every reason why a model with this config.json has no portable graphs."""
    family = family_of(config).model_type
    if family not in FAMILIES:
        fix = f"supported: {', '.join(FAMILIES)}"
        return [_problem(f"portable onnx cannot export the family {family}", fix)]
    found = []
    if export.dtype not in (None, "float32"):
        found.append(_problem(f"portable onnx cannot export {export.dtype}", "supported: float32"))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE_TYPES:
        cause = f"portable onnx cannot export the rope type {str(kind)[:40]!r}"
        found.append(_problem(cause, f"supported: {', '.join(ROPE_TYPES)}"))
    if _windows(family, config):
        cause = "portable onnx cannot export layers that attend in a window"
        found.append(_problem(cause, "leave `backend` out, or a model with sliding_window null"))
    return found


def build(checkpoint: Checkpoint, folder: Path) -> None:
    """Trace the checkpoint in float32 and write its graphs and their weights into `folder`.

    ENGINE when the exporter fails.
    """
    import torch
    from transformers import GenerationConfig
    from transformers.exporters import OnnxConfig, OnnxExporter

    from paretron.artifacts.models import load_model

    scratch = folder / "traced"
    scratch.mkdir()
    model = load_model(checkpoint.path)
    ids = torch.arange(_SAMPLE_LEN)[None] % int(checkpoint.config["vocab_size"])
    sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    # No token ends it: a second step is needed to trace decoding.
    greedy = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
    other = "leave `backend` out: the model builder makes other graphs"
    with told_of("transformers' ONNX exporter", fix=other), quiet():
        programs: dict[str, Any] = OnnxExporter().export_for_generation(
            model, sample, OnnxConfig(dynamic=True, opset_version=OPSET), generation_config=greedy
        )
        for name in GRAPHS:
            programs[name].save(scratch / f"{name}.onnx", external_data=True)
    del programs, model
    share_weights({n: scratch / f"{n}.onnx" for n in GRAPHS}, folder, data=DATA)
    for file in scratch.iterdir():
        file.unlink()
    scratch.rmdir()


def _windows(family: str, config: Mapping[str, Any]) -> bool:
    """Whether any layer attends in a window, by the config's own word."""
    if "sliding_attention" in (config.get("layer_types") or ()):
        return True
    if family in ("qwen2", "qwen3", "smollm3"):
        return bool(config.get("use_sliding_window"))
    absent = 4096 if family == "mistral" else None
    return config.get("sliding_window", absent) is not None


def _problem(cause: str, fix: str) -> Problem:
    return Problem(Code.UNSUPPORTED, cause, fix=fix)
