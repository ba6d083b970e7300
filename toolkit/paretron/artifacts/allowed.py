"""Which keys of a model's JSON files are kept: those that are known, and none that names code.

A key that nobody here knows may belong to a fork that computes something else; it is left out, and
said once. A file whose keys are all fine is not touched.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from paretron.errors import Code, ParetronError, Problem
from paretron.families import Family

# Keys that name code to run, kernels from a hub included.
CODE_KEYS = (
    "attn_implementation", "auto_map", "custom_generate", "custom_pipelines",
    "experts_implementation", "trust_remote_code",
)  # fmt: skip
# The library's own book-keeping, of no meaning elsewhere: left out without a word.
_QUIET = (
    "_attn_implementation_autoset", "_commit_hash", "_flash_attn_2_enabled", "_name_or_path",
    "_sliding_window_pattern",
)  # fmt: skip

# What the configs of all families have: sizes, tokens, rotary embedding, dropout, and what the
# library's base class writes.
COMMON = frozenset(
    (
        "architectures", "attention_bias", "attention_dropout", "bos_token_id",
        "chunk_size_feed_forward", "classifier_dropout", "cls_token_id", "decoder_start_token_id",
        "dtype", "eos_token_id", "finetuning_task", "head_dim", "hidden_act", "hidden_size",
        "id2label", "initializer_range", "intermediate_size", "is_decoder", "is_encoder_decoder",
        "label2id", "layer_types", "max_position_embeddings", "model_type", "num_attention_heads",
        "num_hidden_layers", "num_key_value_heads", "output_attentions", "output_hidden_states",
        "pad_token_id", "partial_rotary_factor", "pretraining_tp", "problem_type", "return_dict",
        "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta", "sep_token_id",
        "sliding_window", "task_specific_params", "tie_word_embeddings", "tokenizer_class",
        "torch_dtype", "transformers_version", "unk_token_id", "use_cache", "use_sliding_window",
        "vocab_size",
    )
)  # fmt: skip


def allowed_keys(family: Family) -> frozenset[str]:
    """Every key that a config of this family may have."""
    named = {t.when for t in family.tensors} | {family.logit_softcap, family.logit_divisor}
    named |= {family.activation, family.full_attention_before}
    return (
        COMMON
        | set(family.settings)
        | set(family.config_keys.values())
        | set(family.per_layer_lists)
        | {*family.aliases, *family.aliases.values()}
        | set(family.absent)
        | named
    ) - {""}


def clean_config(
    config: Mapping[str, Any], family: Family, *, layers: int
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A config's known keys, and a notice of what was left out.

    An unknown list with one entry a layer stays: what it says of each layer is lost when layers
    are, so that who removes some must see it and refuse.
    """
    allowed = allowed_keys(family)
    per_layer = [
        key
        for key, value in config.items()
        if isinstance(value, list) and len(value) == layers and _plain(key) and key not in allowed
    ]
    kept = {k: v for k, v in config.items() if k in allowed or k in per_layer}
    unsaid = {k for k, v in config.items() if v is None}  # nothing is lost with it
    return kept, left_out("config.json", set(config) - set(kept) - unsaid)


def code_keys(content: Mapping[str, Any], *, known: Collection[str] = ()) -> set[str]:
    """The keys of a file that name code, or that start with an underscore and are not `known`."""
    return {k for k in content if k not in known and not _plain(k)}


def check_token_ids(content: Mapping[str, Any], *, vocab: int, file: str, code: Code) -> None:
    """`code` when a special token's number, alone or in a list, is no row of the embedding."""
    for key, value in content.items():
        if not key.endswith("_token_id") or value is None or key not in COMMON:
            continue
        numbers = value if isinstance(value, list) else [value]
        if not all(type(n) is int and 0 <= n < vocab for n in numbers):
            raise ParetronError(
                Problem(
                    code,
                    f"{key} is {str(value)[:60]}, but the vocabulary has {vocab} tokens",
                    where=f"{file}: {key}",
                    fix=f"a number from 0 to {vocab - 1}, or leave it out",
                )
            )


def left_out(file: str, keys: Iterable[str]) -> tuple[str, ...]:
    """One notice that names the keys; none where there is nothing worth a word."""
    said = sorted(k for k in keys if k not in _QUIET)
    if not said:
        return ()
    shown = ", ".join(k[:60] for k in said[:12]) + (" ..." if len(said) > 12 else "")
    return (f"{file}: left out {shown}",)


def _plain(key: str) -> bool:
    return key not in CODE_KEYS and not key.startswith("_")
