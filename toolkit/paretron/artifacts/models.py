"""Checkpoint folders to and from transformers models, through the guarded reader and writer."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

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

from paretron.artifacts.companions import copy_tokenizer, write_companions
from paretron.artifacts.config import DTYPE_NAMES, servable_config
from paretron.artifacts.held import on_disk
from paretron.artifacts.reader import Checkpoint
from paretron.artifacts.tokenizer import embedding_rows, named_code, tokenizer_problems
from paretron.artifacts.writer import DEFAULT_SHARD_BYTES, TensorWriter, dtype_name
from paretron.errors import Code, ParetronError, Problem, raise_all
from paretron.families import Family, expected_tensors, family_of, sizes
from paretron.families.experts import odd_widths

# Bars of its own would tear ours; stages report progress themselves.
disable_progress_bar()


def load_model(
    path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    attention: Literal["sdpa", "flash_attention_2"] = "sdpa",
) -> PreTrainedModel:
    """The checkpoint as a transformers model on the CPU, in eval mode.

    `attention` other than sdpa is for models whose scores have no cap.
    The folder is checked from its headers first; nothing is downloaded and no code of the
    checkpoint runs. INPUT_CONFIG when transformers refuses a value of the config, GATE_RELOAD when
    it finds a tensor missing or unexpected.
    """
    config = library_config(Checkpoint.open(path))
    if attention != "sdpa":
        config._attn_implementation = attention
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


def library_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """The checked config as transformers' own; its file is not read a second time."""
    return as_library_config(checkpoint.config, where=str(checkpoint.path / "config.json"))


def as_library_config(values: Mapping[str, Any], *, where: str) -> PreTrainedConfig:
    """A config as transformers' own; INPUT_CONFIG at `where` when it refuses a value."""
    family = family_of(values)
    try:
        config = type(AutoConfig.for_model(values["model_type"])).from_dict(
            {**values, **_experts_setting(family, values)}
        )
        ACT2FN[getattr(config, family.activation)]
        if values.get(family.attention_softcap) is not None:
            config._attn_implementation = "eager"  # the library's default leaves the cap out
    except (TypeError, ValueError, KeyError, AttributeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ParetronError(
            Problem(
                Code.INPUT_CONFIG,
                f"transformers refuses it: {type(error).__name__}: {reason}",
                where=where,
                fix="correct the value it names",
            )
        ) from error
    return config


def _experts_setting(family: Family, config: Mapping[str, Any]) -> dict[str, str]:
    """How experts are run: one by one where the grouped product refuses their widths."""
    odd = odd_widths(sizes(family, config))
    return {"experts_implementation": "eager"} if odd else {}


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The folder's tokenizer; INPUT_TOKENIZER when there is none or it cannot be read.

    Where a model's config stands beside it, its numbers must fit that model's embedding. No code
    that the files name is run.
    """
    raise_all(tokenizer_problems(path, vocab=embedding_rows(path)))
    with tempfile.TemporaryDirectory(prefix="paretron-") as clean:
        folder = path
        if named_code(path):  # the library would refuse them
            folder = Path(clean)
            copy_tokenizer(path, folder)
        try:
            return AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # of a bad file: bare Exception, or a panic that is none
            reason = " ".join(str(error).split())[:200]
            raise ParetronError(
                Problem(
                    Code.INPUT_TOKENIZER,
                    f"{type(error).__name__}: {reason}",
                    where=str(path),
                    fix="restore tokenizer.json and tokenizer_config.json from where the model "
                    "came",
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

    `model` is one of transformers, or a state under the names of one.
    `config` is the checkpoint's own (not the library's dump of it); tokenizer and generation
    config are copied from the folder `companions`.
    """
    held = model.state_dict() if isinstance(model, torch.nn.Module) else model
    family = family_of(config)
    state = on_disk(held, family, config)
    names = expected_tensors(family, config)
    layout = {n: (dtype_name(state[n]), tuple(state[n].shape)) for n in names}
    with TensorWriter(folder, layout, max_shard_bytes=max_shard_bytes) as writer:
        for name in names:
            writer.write(name, state[name])
    dtype = DTYPE_NAMES[layout["model.embed_tokens.weight"][0]]
    write_companions(folder, config=servable_config(config, dtype=dtype), source=companions)
