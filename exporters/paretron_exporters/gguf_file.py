"""A GGUF file, written and read: the one place that imports the gguf package.

llama.cpp rotates neighbouring channels where transformers rotates halves, so rows of q_proj and
k_proj are reordered for the llama architecture, which Mistral shares; the Qwen architectures keep
the order. Vectors stay in F32 whatever the matrices are, as llama.cpp's own converter does.
"""

from __future__ import annotations

import math
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
from paretron_exporters.gguf_tokenizer import GgufTokenizer, read_tokenizer

if TYPE_CHECKING:
    import gguf

# llama.cpp's architectures; Mistral is one of its llamas.
ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
_DTYPES = {"F32": np.float32, "F16": np.float16}  # the others are bytes to the writer
_OF_DTYPE = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
ROPE_FREQS = "rope_freqs.weight"


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

    names = gguf_names(checkpoint)
    tokenizer = read_tokenizer(checkpoint.path, vocab=checkpoint.config["vocab_size"])
    architecture = gguf.MODEL_ARCH[ARCHITECTURES[_type(checkpoint)]]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    _settings(writer, checkpoint, kind)
    _tokenizer(writer, tokenizer)
    frequencies = rope_factors(checkpoint.config, sizes(checkpoint.family, checkpoint.config))
    if frequencies is not None:
        writer.add_tensor_info(ROPE_FREQS, frequencies.shape, frequencies.dtype, frequencies.nbytes)
    for name, target in names.items():
        shape = checkpoint.entries[name].shape
        of = gguf.GGMLQuantizationType[type_of(shape, kind)]
        stored, dtype = tuple(shape), np.dtype(_DTYPES.get(of.name, np.uint8))
        if of.name not in _DTYPES:
            stored = gguf.quant_shape_to_byte_shape(shape, of)
        nbytes = math.prod(stored) * dtype.itemsize
        writer.add_tensor_info(target, stored, dtype, nbytes, raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if frequencies is not None:
        writer.write_tensor_data(frequencies)
    for done, name in enumerate(names, start=1):
        tensor = to_gguf_rows(name, checkpoint.read(name), checkpoint)
        of = gguf.GGMLQuantizationType[type_of(tensor.shape, kind)]
        writer.write_tensor_data(gguf.quants.quantize(tensor.float().numpy(), of))
        on_event("progress", {"done": done, "total": len(names), "unit": "tensors"})
    writer.close()
    return tuple(_notes(checkpoint.config, tokenizer))


def gguf_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Name on disk -> name in the file, in execution order."""
    import gguf

    architecture = gguf.MODEL_ARCH[ARCHITECTURES[_type(checkpoint)]]
    known = gguf.get_tensor_name_map(architecture, checkpoint.config["num_hidden_layers"])
    names = {}
    for name in expected_tensors(checkpoint.family, checkpoint.config):
        found = known.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None  # the exporter takes only families whose names are all known
        names[name] = found
    return names


def type_of(shape: Sequence[int], kind: str) -> str:
    """The GGUF type of a tensor: vectors are never rounded."""
    return "F32" if len(shape) == 1 else kind


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


def to_gguf_rows(name: str, tensor: torch.Tensor, checkpoint: Checkpoint) -> torch.Tensor:
    """The rows in llama.cpp's order: the halves of every head interleaved."""
    heads = _rotated_heads(name, checkpoint)
    if heads is None:
        return tensor
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def from_gguf_rows(name: str, tensor: torch.Tensor, checkpoint: Checkpoint) -> torch.Tensor:
    """The inverse of `to_gguf_rows`."""
    heads = _rotated_heads(name, checkpoint)
    if heads is None:
        return tensor
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def _rotated_heads(name: str, checkpoint: Checkpoint) -> int | None:
    if ARCHITECTURES[_type(checkpoint)] != "LLAMA":
        return None
    size = sizes(checkpoint.family, checkpoint.config)
    if ".q_proj." in name:
        return size["kv_heads"] * size["q_per_kv"]
    return size["kv_heads"] if ".k_proj." in name else None


def rope_factors(config: Mapping[str, Any], size: Sizes) -> npt.NDArray[np.float32] | None:
    """What llama3 scaling divides each rotary frequency by, [head_dim / 2]; None without it.

    Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between blended.
    """
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if rope.get("rope_type") != "llama3":
        return None
    base = float(rope.get("rope_theta") or config["rope_theta"])
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
    writer.add_feed_forward_length(size["ffn"])
    writer.add_head_count(size["kv_heads"] * size["q_per_kv"])
    writer.add_head_count_kv(size["kv_heads"])
    writer.add_key_length(size["head_dim"])
    writer.add_value_length(size["head_dim"])
    writer.add_rope_dimension_count(size["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(size["vocab"])
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta") or 1e4))
    if (rope.get("rope_type") or rope.get("type")) == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    mostly = "ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"
    writer.add_file_type(gguf.LlamaFileType[mostly])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


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


def _type(checkpoint: Checkpoint) -> str:
    return checkpoint.family.model_type
