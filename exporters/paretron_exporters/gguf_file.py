"""A GGUF file, written and read: the one place that imports the gguf package.

Some of llama.cpp's architectures rotate neighbouring channels where transformers rotates halves:
for those the rows of q_proj and k_proj are reordered. The matrices of all experts are stacked into
one tensor, and what a norm adds to its weight is added in the file. Vectors and routers stay in F32
whatever the matrices are, as in llama.cpp's own converter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from paretron.artifacts.reader import Checkpoint
from paretron.families import Sizes, expected_tensors, sizes
from paretron.recipe import Export
from paretron_exporters.exporter import OnEvent
from paretron_exporters.gguf_limits import ARCHITECTURES, rope_settings
from paretron_exporters.gguf_tokenizer import GgufTokenizer, read_tokenizer

if TYPE_CHECKING:
    import gguf

_DTYPES = {"F32": np.float32, "F16": np.float16}  # the others are bytes to the writer
_OF_DTYPE = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
ROPE_FREQS = "rope_freqs.weight"
_EXPERT = re.compile(r"experts\.\d+\.(\w+)")
_LAYERNORM_EPSILON = 1e-5  # what a config means that does not say


def written_as(checkpoint: Checkpoint, export: Export) -> str:
    """The GGUF type of the matrices: the quantisation, the dtype asked for, or the source's."""
    if export.quantize is not None:
        return export.quantize.upper()
    if export.dtype is not None:
        return _OF_DTYPE[export.dtype]
    return checkpoint.dtype if checkpoint.dtype in ("F32", "F16", "BF16") else "F32"


def write_gguf(
    checkpoint: Checkpoint, path: Path, *, kind: str, on_event: OnEvent
) -> tuple[str, ...]:
    """Write one file and return what a user should know about it; one tensor is in memory."""
    import gguf

    tensors = gguf_tensors(checkpoint)
    tokenizer = read_tokenizer(checkpoint.path, vocab=checkpoint.config["vocab_size"])
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[_architecture(checkpoint)])
    _settings(writer, checkpoint, kind)
    _tokenizer(writer, tokenizer)
    frequencies = rope_factors(checkpoint.config, sizes(checkpoint.family, checkpoint.config))
    if frequencies is not None:
        writer.add_tensor_info(ROPE_FREQS, frequencies.shape, frequencies.dtype, frequencies.nbytes)
    for target, names in tensors.items():
        shape = stored_shape(checkpoint, names)
        of = gguf.GGMLQuantizationType[type_of(target, shape, kind)]
        stored, dtype = shape, np.dtype(_DTYPES.get(of.name, np.uint8))
        if of.name not in _DTYPES:
            stored = gguf.quant_shape_to_byte_shape(shape, of)
        nbytes = math.prod(stored) * dtype.itemsize
        writer.add_tensor_info(target, stored, dtype, nbytes, raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if frequencies is not None:
        writer.write_tensor_data(frequencies)
    for done, (target, names) in enumerate(tensors.items(), start=1):
        tensor = _joined([to_gguf(n, checkpoint.read(n), checkpoint) for n in names])
        of = gguf.GGMLQuantizationType[type_of(target, tensor.shape, kind)]
        writer.write_tensor_data(gguf.quants.quantize(tensor.numpy(), of))
        on_event("progress", {"done": done, "total": len(tensors), "unit": "tensors"})
    writer.close()
    return tuple(_notes(checkpoint.config, tokenizer))


def gguf_tensors(checkpoint: Checkpoint) -> dict[str, tuple[str, ...]]:
    """Name in the file -> names on disk, in execution order; of experts all that are stacked."""
    import gguf

    layers = checkpoint.config["num_hidden_layers"]
    known = gguf.get_tensor_name_map(_architecture(checkpoint), layers)
    found: dict[str, list[str]] = {}
    for name in expected_tensors(checkpoint.family, checkpoint.config):
        merged = _EXPERT.sub(r"experts.\1", name)
        target = known.get_name(merged, try_suffixes=(".weight", ".bias"))
        assert target is not None  # the exporter takes only families whose names are all known
        found.setdefault(target, []).append(name)
    return {target: tuple(names) for target, names in found.items()}


def stored_shape(checkpoint: Checkpoint, names: Sequence[str]) -> tuple[int, ...]:
    """The shape of a tensor in the file: (experts, out, in) where it is a stack."""
    shape = tuple(checkpoint.entries[names[0]].shape)
    return (len(names), *shape) if _EXPERT.search(names[0]) else shape


def type_of(target: str, shape: Sequence[int], kind: str) -> str:
    """The GGUF type of a tensor: vectors and routers are never rounded."""
    return "F32" if len(shape) == 1 or ".ffn_gate_inp." in target else kind


@dataclass(frozen=True)
class Stored:
    """One tensor of a file; `values` dequantises it to fp32 when it is called."""

    shape: tuple[int, ...]
    values: Callable[[], torch.Tensor]


def read_gguf(path: Path) -> dict[str, Stored]:
    """The tensors of a file by name, through the gguf package's own reader."""
    import gguf

    def values(tensor: gguf.ReaderTensor) -> torch.Tensor:
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        return torch.from_numpy(found.copy()).float()

    return {
        t.name: Stored(tuple(int(d) for d in reversed(t.shape)), partial(values, t))
        for t in gguf.GGUFReader(path).tensors
    }


def to_gguf(name: str, tensor: torch.Tensor, checkpoint: Checkpoint) -> torch.Tensor:
    """A tensor as the file holds it, in float32: a norm's whole factor, rotated rows in order."""
    tensor = tensor.float() + norm_offset(name, checkpoint)
    heads = _rotated_heads(name, checkpoint)
    if heads is None:
        return tensor
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def from_gguf(name: str, tensor: torch.Tensor, checkpoint: Checkpoint) -> torch.Tensor:
    """Rows in the order of the disk again; what a norm adds to its weight is still in it."""
    heads = _rotated_heads(name, checkpoint)
    if heads is None:
        return tensor
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def norm_offset(name: str, checkpoint: Checkpoint) -> float:
    """What a tensor has more in the file than on disk."""
    return checkpoint.family.norm_offset if name.endswith("norm.weight") else 0.0


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts)


def _rotated_heads(name: str, checkpoint: Checkpoint) -> int | None:
    if not ARCHITECTURES[checkpoint.family.model_type].neighbours:
        return None
    size = sizes(checkpoint.family, checkpoint.config)
    if ".q_proj." in name:
        return size["kv_heads"] * size["q_per_kv"]
    return size["kv_heads"] if ".k_proj." in name else None


def rope_factors(config: Mapping[str, Any], size: Sizes) -> npt.NDArray[np.float32] | None:
    """What llama3 scaling divides each rotary frequency by, [head_dim / 2]; None without it.

    Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between blended.
    """
    rope = rope_settings(config)
    if rope["rope_type"] != "llama3":
        return None
    base = rope["rope_theta"]
    pairs = torch.arange(0, size["head_dim"], 2, dtype=torch.float64) / size["head_dim"]
    wavelength = 2 * math.pi * base**pairs
    original = rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    frequency = (1 - smooth) / factor + smooth  # relative to the unscaled one
    return np.asarray((1 / frequency).float().numpy())


def _settings(writer: gguf.GGUFWriter, checkpoint: Checkpoint, kind: str) -> None:
    import gguf

    config, size = checkpoint.config, sizes(checkpoint.family, checkpoint.config)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(size["hidden"])
    writer.add_block_count(size["layers"])
    writer.add_feed_forward_length(size["ffn"] if "ffn" in size else size["moe_ffn"])
    writer.add_head_count(size["kv_heads"] * size["q_per_kv"])
    writer.add_head_count_kv(size["kv_heads"])
    writer.add_key_length(size["head_dim"])
    writer.add_value_length(size["head_dim"])
    _norms(writer, checkpoint)
    writer.add_vocab_size(size["vocab"])
    rope = rope_settings(config)
    writer.add_rope_dimension_count(int(size["head_dim"] * rope["partial_rotary_factor"]))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if "experts" in size:
        writer.add_expert_count(size["experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(size["moe_ffn"])
    if checkpoint.family.model_type == "granite":
        _factors(writer, config)
    if checkpoint.family.model_type == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config["max_position_embeddings"])
        writer.add_sliding_window(0)  # by which it tells Phi-4, which has none
    mostly = "ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"
    writer.add_file_type(gguf.LlamaFileType[mostly])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _norms(writer: gguf.GGUFWriter, checkpoint: Checkpoint) -> None:
    """The epsilon, under the one of two names that the kind of norm has."""
    config = checkpoint.config
    if checkpoint.family.norm == "layernorm":
        stated = config.get("norm_eps", config.get("norm_epsilon"))
        writer.add_layer_norm_eps(_LAYERNORM_EPSILON if stated is None else stated)
    else:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def _factors(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    """Granite's; a graph without them would take another scale of attention, and none else."""
    writer.add_attention_scale(float(config.get("attention_multiplier", 1.0)))
    writer.add_embedding_scale(float(config.get("embedding_multiplier", 1.0)))
    writer.add_residual_scale(float(config.get("residual_multiplier", 1.0)))
    writer.add_logit_scale(float(config.get("logits_scaling", 1.0)))


def context_length(config: Mapping[str, Any]) -> int:
    """The positions that llama.cpp may use: it attends to all of them, window or not."""
    longest = int(config["max_position_embeddings"])
    return min(longest, int(config.get("sliding_window") or longest))


def _tokenizer(writer: gguf.GGUFWriter, tokenizer: GgufTokenizer) -> None:
    writer.add_tokenizer_model("gpt2")  # the format's word for a byte-level BPE
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.types)
    writer.add_token_merges(tokenizer.merges)
    for kind, token in tokenizer.special.items():
        writer.add_uint32(f"tokenizer.ggml.{kind}_token_id", token)
    if tokenizer.adds_bos is not None:
        writer.add_add_bos_token(tokenizer.adds_bos)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def _notes(config: Mapping[str, Any], tokenizer: GgufTokenizer) -> Iterator[str]:
    if tokenizer.pre == "default":
        yield (
            "llama.cpp has no name for the way this tokenizer splits text: compare its tokens "
            "before you trust the file"
        )
    if context_length(config) < config["max_position_embeddings"]:
        yield (
            f"the context ends at the attention window of {context_length(config)} tokens: "
            "llama.cpp knows no window for this architecture"
        )


def _architecture(checkpoint: Checkpoint) -> Any:
    """The member of gguf.MODEL_ARCH, an IntEnum that the package types as int."""
    import gguf

    return gguf.MODEL_ARCH[ARCHITECTURES[checkpoint.family.model_type].name]
