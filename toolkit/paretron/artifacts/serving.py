"""What serving engines take of a checkpoint's shape, told from its config alone.

An engine that was not tried with a family is said to be untried: nothing here is a guess.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from paretron.artifacts.config import relabel
from paretron.errors import ParetronError
from paretron.families import Family, Sizes, family_of, sizes

# Widths of a head that attention kernels are made for.
GPU_HEAD_DIMS = (64, 128)
VLLM_CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
TP_DEGREES = (1, 2, 4, 8, 16)
# Families whose greedy tokens vLLM was seen to give as transformers does.
_VLLM_TRIED = ("llama", "mistral", "qwen3", "nemotron", "mixtral", "qwen3_moe")

# Families that TensorRT-LLM's list of models for its PyTorch backend names; none was run here.
_TENSORRT_LLM_NAMED = (
    "gemma3_text", "llama", "mistral", "mixtral", "nemotron", "qwen2", "qwen3", "qwen3_moe",
)  # fmt: skip
_NEVER_RUN = ("SGLang", "TensorRT-LLM", "Triton Inference Server", "llama.cpp")

Answer = Literal["yes", "no", "untried"]


@dataclass(frozen=True)
class Served:
    """Whether an engine loads a checkpoint, why not, and over how many devices it can be split."""

    engine: str
    loads: Answer
    reason: str
    tensor_parallel: tuple[int, ...]

    def as_json(self) -> dict[str, Any]:
        """The stable form in `inspect --json`."""
        return {
            "loads": self.loads,
            "reason": self.reason,
            "tensor_parallel": list(self.tensor_parallel),
        }


def served_by(config: Mapping[str, Any]) -> tuple[Served, ...]:
    """What the engines that load a Hugging Face checkpoint make of this config."""
    family = family_of(config)
    degrees = tensor_parallel_degrees(family, sizes(family, config))
    try:
        relabel(config)
    except ParetronError as error:
        why = error.problems[0].cause
        return tuple(Served(e, "no", why, ()) for e in ("transformers", "vllm", "tensorrt-llm"))
    limit = vllm_limit(config)
    tried = family.model_type in _VLLM_TRIED
    vllm: Answer = "no" if limit else "yes" if tried else "untried"
    return (
        Served("transformers", "yes", "", (1,)),
        Served(
            "vllm",
            vllm,
            limit or ("" if tried else f"no {family.model_type} was run there yet"),
            () if limit else degrees,
        ),
        Served("tensorrt-llm", "untried", "takes this format from 1.2 on, says its maker", degrees),
    )


def card_engines(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The engines that an exported checkpoint's card tells how to start: those that may load it.

    SGLang's models were made from vLLM's, so what is known not to load there is kept from both.
    """
    family = family_of(config)
    names = ["transformers"]
    if not vllm_limit(config):
        names += ["vLLM", "SGLang"]
    if family.model_type in _TENSORRT_LLM_NAMED:
        names.append("TensorRT-LLM")
    return tuple(names)


def unrun_note(engines: Sequence[str], config: Mapping[str, Any] | None = None) -> str:
    """Which of the engines on a card were never run by us, or not with this model, or nothing."""
    names = [name for name in engines if name in _NEVER_RUN]
    if config is not None and "vLLM" in engines:
        family = family_of(config).model_type
        names += [] if family in _VLLM_TRIED else [f"vLLM with {family}"]
    return f"Never run by Paretron's own tests: {', '.join(names)}." if names else ""


def tensor_parallel_degrees(family: Family, size: Sizes) -> tuple[int, ...]:
    """Over how many devices the matrices of a family can be split evenly."""
    return tuple(d for d in TP_DEGREES if not indivisible(family, size, d))


def indivisible(family: Family, size: Sizes, degree: int) -> dict[str, int]:
    """The axes that keep a model from being split over `degree` devices, with their sizes.

    Query heads, MLP and vocabulary are cut; so are key-value heads, unless there are fewer of them
    than devices: then each is kept on several.
    """
    cut = {"heads": size["kv_heads"] * size["q_per_kv"], "kv_heads": size["kv_heads"]}
    named = {axis for row in family.tensors for dim in row.dims for seg in dim for axis in seg}
    here = named & size.keys()  # a kind of layer may be absent
    cut |= {axis: size[axis] for axis in ("ffn", "moe_ffn", "vocab") if axis in here}
    return {
        axis: n
        for axis, n in cut.items()
        if n % degree and not (axis == "kv_heads" and degree % n == 0)
    }


def vllm_limit(config: Mapping[str, Any]) -> str:
    """Why vLLM cannot load a shape that transformers can, or nothing."""
    family = family_of(config)
    size = sizes(family, config)
    width = size["kv_heads"] * size["q_per_kv"] * size["head_dim"]
    if family.vllm_head_dim or width == size["hidden"]:
        return ""
    return (
        f"vLLM (0.32) cannot load it: for {family.model_type} it takes head_dim for hidden / "
        f"heads, but heads * head_dim is {width} and the hidden size {size['hidden']}."
    )


def transformers_note(config: Mapping[str, Any]) -> str:
    """What transformers must be told to compute what the model is, or nothing."""
    if config.get(family_of(config).attention_softcap) is None:
        return ""
    return (
        'In transformers (5.19) load it with attn_implementation="eager": the default leaves out '
        "the cap on attention scores."
    )
