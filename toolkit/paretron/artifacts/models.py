"""Checkpoint folders to and from transformers models, through the guarded reader and writer."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.activations import ACT2FN
from transformers.utils.logging import disable_progress_bar

from paretron.artifacts.config import DTYPE_NAMES, servable_config
from paretron.artifacts.jsonfile import dump
from paretron.artifacts.reader import Checkpoint
from paretron.artifacts.writer import DEFAULT_SHARD_BYTES, TensorWriter, dtype_name
from paretron.errors import Code, ParetronError, Problem
from paretron.families import expected_tensors, family_of

# Bars of its own would tear ours; stages report progress themselves.
disable_progress_bar()

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def load_model(path: Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The checkpoint as a transformers model on the CPU, in eval mode.

    The folder is checked from its headers first; nothing is downloaded and no code of the
    checkpoint runs. INPUT_CONFIG when transformers refuses a value of the config, GATE_RELOAD when
    it finds a tensor missing or unexpected.
    """
    config = _library_config(Checkpoint.open(path))
    model, info = AutoModelForCausalLM.from_pretrained(
        path,
        config=config,
        dtype=dtype,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )
    for finding in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[finding]:
            raise ParetronError(
                Problem(
                    Code.GATE_RELOAD,
                    f"transformers reports {finding}: {sorted(map(str, info[finding]))[:5]}",
                    where=str(path),
                    fix="try another transformers version: this one names the tensors otherwise",
                )
            )
    return model.eval()


def _library_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """The checked config as transformers' own; its file is not read a second time."""
    try:
        config = type(AutoConfig.for_model(checkpoint.config["model_type"])).from_dict(
            checkpoint.config
        )
        ACT2FN[config.hidden_act]
    except (TypeError, ValueError, KeyError, AttributeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ParetronError(
            Problem(
                Code.INPUT_CONFIG,
                f"transformers refuses it: {type(error).__name__}: {reason}",
                where=str(checkpoint.path / "config.json"),
                fix="correct the value it names",
            )
        ) from error
    return config


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The folder's tokenizer; INPUT_TOKENIZER when there is none or it cannot be read."""
    if not (path / "tokenizer.json").is_file():
        raise ParetronError(
            Problem(
                Code.INPUT_TOKENIZER,
                "no tokenizer.json here",
                where=str(path),
                fix="copy the tokenizer files beside the weights",
            )
        )
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises bare Exception for a bad tokenizer.json
        reason = " ".join(str(error).split())[:200]
        raise ParetronError(
            Problem(
                Code.INPUT_TOKENIZER,
                f"{type(error).__name__}: {reason}",
                where=str(path),
                fix="restore tokenizer.json and tokenizer_config.json from where the model came",
            )
        ) from error


def save_model(
    model: PreTrainedModel | Mapping[str, torch.Tensor],
    folder: Path,
    *,
    config: Mapping[str, Any],
    companions: Path,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write a Hugging Face repository: weights by the family's table, config, tokenizer.

    `config` is the checkpoint's own (not the library's dump of it); tokenizer and generation
    config are copied from the folder `companions`.
    """
    state = model.state_dict() if isinstance(model, torch.nn.Module) else model
    names = expected_tensors(family_of(config), config)
    layout = {n: (dtype_name(state[n]), tuple(state[n].shape)) for n in names}
    with TensorWriter(folder, layout, max_shard_bytes=max_shard_bytes) as writer:
        for name in names:
            writer.write(name, state[name])
    dtype = DTYPE_NAMES[layout["model.embed_tokens.weight"][0]]
    write_companions(folder, config=servable_config(config, dtype=dtype), source=companions)


def write_companions(folder: Path, *, config: Mapping[str, Any], source: Path) -> None:
    """Everything of a repository but weights and card: config, tokenizer, generation config."""
    dump(folder / "config.json", dict(config))
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")
    else:
        ids = {
            k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if k in config
        }
        dump(folder / "generation_config.json", {"_from_model_config": True} | ids)
