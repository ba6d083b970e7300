"""Pico models: complete Hugging Face repositories of any family, small enough for every test.

The weights are random but nothing is neutral: norms are not all ones, biases not all zeros, and
heads * head_dim differs from the hidden size, so that a forgotten axis shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

_SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 512, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
_FAMILY: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6, "rope_theta": 10000.0},
    "mistral": {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "sliding_window": None},
    "qwen2": {"rms_norm_eps": 1e-6, "rope_theta": 10000.0},
    "qwen3": {"rms_norm_eps": 1e-6, "rope_theta": 10000.0},
    "nemotron": {
        "norm_eps": 1e-5, "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
        "hidden_act": "relu2",
    },
    "gemma2": {
        "rope_theta": 10000.0, "sliding_window": 8, "query_pre_attn_scalar": 24,
        "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0,
    },
    "gemma3_text": {
        "rope_theta": 10000.0, "rope_local_base_freq": 100.0, "sliding_window": 8,
        "sliding_window_pattern": 2, "query_pre_attn_scalar": 24,
    },
    "phi3": {"rope_theta": 10000.0, "original_max_position_embeddings": 512},
    "olmo2": {"rope_theta": 10000.0},
    "granite": {
        "rope_theta": 10000.0, "embedding_multiplier": 3.0, "attention_multiplier": 0.25,
        "residual_multiplier": 0.5, "logits_scaling": 2.0,
    },
    "starcoder2": {"rope_theta": 10000.0},
    "smollm3": {"rope_theta": 10000.0, "no_rope_layer_interval": 2},
    "mixtral": {
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "num_local_experts": 4,
        "num_experts_per_tok": 2, "sliding_window": None, "intermediate_size": 48,
    },
    # The second layer has an MLP in place of experts.
    "qwen3_moe": {
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 48, "mlp_only_layers": [1], "norm_topk_prob": True,
    },
}  # fmt: skip

# Their MLP is one of experts.
MOE_FAMILIES = tuple(name for name, config in _FAMILY.items() if "num_experts_per_tok" in config)
PICO_FAMILIES = tuple(name for name in _FAMILY if name not in MOE_FAMILIES)

_SPECIAL = ("<s>", "</s>", "<pad>")
_UNUSED = 8
_TEXT = (
    "the cat sat on the mat and the dog ran after it, because the sun was warm and the day long; "
    "def main(self): return self.value + 1  # and then some more of the same, over and over again"
)


def make_pico(
    folder: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    dtype: str = "float32",
    **config: Any,
) -> Path:
    """Write a pico checkpoint with tokenizer into `folder` and return it.

    `config` overrides any key of config.json, e.g. `num_hidden_layers=2`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = _SIZES | _FAMILY[family] | config
    model = pico_model(family, seed=seed, **config).to(getattr(torch, dtype))
    model.config.dtype = dtype
    model.save_pretrained(folder)
    tokenizer = pico_tokenizer(int(settings["vocab_size"]))
    tokenizer.save_pretrained(folder)
    return folder


def pico_model(family: str = "llama", *, seed: int = 0, **config: Any) -> PreTrainedModel:
    """The model itself, in fp32 and eval mode, without writing anything."""
    settings = _SIZES | _FAMILY[family] | config
    hf_config = AutoConfig.for_model(family, **settings)
    # The default way of running experts knows no float64.
    eager = {"experts_implementation": "eager"} if family in MOE_FAMILIES else {}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(hf_config, **eager)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _fill(name, parameter, generator)
    model.tie_weights()
    return model.eval()


def pico_tokenizer(vocab_size: int = 320) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer for an embedding of `vocab_size` rows, the same every time.

    A few rows stay unused, as in real checkpoints: transformers adds tokens for some families.
    """
    if vocab_size < 256 + len(_SPECIAL) + _UNUSED:
        raise ValueError(f"a byte-level vocabulary needs {256 + len(_SPECIAL) + _UNUSED} rows")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - _UNUSED,
        special_tokens=list(_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([_TEXT], trainer)
    bos, eos, pad = _SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=bos, eos_token=eos, pad_token=pad, model_max_length=512
    )


def _fill(name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
    noise = torch.randn(parameter.shape, generator=generator)
    if parameter.dim() >= 2:
        # Embeddings of size one, linears that keep the scale of what they read.
        scale = 1.0 if "embed_tokens" in name else parameter.shape[-1] ** -0.5
        parameter.copy_(noise * scale)
    elif name.endswith("bias"):
        parameter.copy_(0.3 * noise)
    else:
        parameter.copy_(1 + 0.3 * noise)
