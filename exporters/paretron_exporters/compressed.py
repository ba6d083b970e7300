"""Our own quantised writer: from a checkpoint's reader to a writer, some rows at a time.

What it writes is the format of compressed-tensors: integers or 8-bit floats with a scale for each
output channel; activations are quantised by the engine as they come, one scale a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from paretron.artifacts.reader import Checkpoint
from paretron.artifacts.writer import TensorWriter
from paretron_exporters.exporter import OnEvent
from paretron_exporters.quantized_forms import SCALE, Form, Layout, quantised

if TYPE_CHECKING:
    import torch

_AT_ONCE = 1 << 23  # weights that are encoded at a time: 32 MB in float32


def write_compressed(
    checkpoint: Checkpoint,
    writer: TensorWriter,
    *,
    form: Form,
    layout: Layout,
    on_event: OnEvent,
) -> None:
    """Stream every tensor to a writer, encoded where the form says so."""
    places = quantised(checkpoint.family, checkpoint.config)
    names = [n for n in layout if not n.endswith(SCALE)]
    for done, name in enumerate(names, start=1):
        tensor = checkpoint.read(name)
        if name in places:
            for part, rows in encoded(name, tensor, form=form):
                writer.write(part, rows)
        else:
            writer.write(name, tensor)
        on_event("progress", {"done": done, "total": len(names), "unit": "tensors"})


def encoded(name: str, weight: torch.Tensor, *, form: Form) -> Iterator[tuple[str, torch.Tensor]]:
    """The codes of a matrix [out, in], some rows at a time, then its scales [out, 1]."""
    import torch

    from paretron_exporters.quantized_codes import encode_rows, row_scales

    scales = []
    for rows in weight.split(max(1, _AT_ONCE // weight.shape[1])):
        scales.append(row_scales(rows, form.codes))
        yield name, encode_rows(rows, scales[-1], form.codes)
    yield f"{name}_scale", torch.cat(scales)


def quantization_config(checkpoint: Checkpoint, form: Form) -> dict[str, Any]:
    """What an engine reads of it: which modules are quantised, and how."""
    kind = "int" if form.codes == "int8" else "float"
    both: Mapping[str, Any] = {"num_bits": 8, "type": kind, "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**both, "strategy": "channel", "dynamic": False},
        "input_activations": {**both, "strategy": "token", "dynamic": True},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": _plain_linears(checkpoint),
        "kv_cache_scheme": None,
    }


def _plain_linears(checkpoint: Checkpoint) -> list[str]:
    """The matrices that stay as they are: the head and the routers of experts."""
    places = quantised(checkpoint.family, checkpoint.config)
    left = [
        name.removesuffix(".weight")
        for name, entry in checkpoint.entries.items()
        if name not in places and len(entry.shape) == 2 and "embed_tokens" not in name
    ]
    return ["lm_head", *(name for name in left if name != "lm_head")]
