"""Which weights of a teacher its correction trains: all, those of its norms, or LoRA adapters.

Adapters exist while a training runs; what is published has them merged into its matrices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from paretron.artifacts.models import load_model
from paretron.artifacts.reader import Checkpoint
from paretron.distill.batches import Batch
from paretron.distill.fused import DeferredLogits
from paretron.distill.objective import predict
from paretron.distill.parallel import whole
from paretron.errors import Code, ParetronError, Problem
from paretron.families import family_of
from paretron.families.parts import layer_linears, norm_parameters
from paretron.recipe import Correct, Training
from paretron.recipe.limits import peft_missing
from paretron.recipe.training import Lora

_INNER = ".base_layer."  # where the matrix under an adapter is found
_A, _B = ".lora_A.default.weight", ".lora_B.default.weight"
# Root mean square of the difference of logits, of that of the logits. A merged weight is rounded
# to the dtype that it is written in, once: 5e-7, 4e-3 and 5e-4 on models of four layers.
_LIMIT = {"F64": 1e-4, "F32": 1e-4, "BF16": 5e-2, "F16": 1e-2}


def choose_trained(model: PreTrainedModel, settings: Correct, *, seed: int) -> None:
    """Freeze all that a correction leaves alone, and add its adapters, drawn by seed; in place.

    Errors: OPTIONAL_MISSING (LoRA without peft).
    """
    if settings.what == "all":
        return
    model.requires_grad_(False)
    if settings.what == "lora":
        _add_adapters(model, settings.lora or Lora(), seed=seed)
        return
    config = model.config.to_dict()
    norms = norm_parameters(family_of(config), config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in norms)


def _add_adapters(model: PreTrainedModel, lora: Lora, *, seed: int) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ParetronError(peft_missing()) from error
    config = model.config.to_dict()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(
            LoraConfig(
                r=lora.rank,
                lora_alpha=lora.alpha,
                lora_dropout=0.0,
                bias="none",
                target_modules=sorted(layer_linears(family_of(config), config)),
            ),
            model,
        )


def starts_still(name: str) -> bool:
    """Whether a parameter's first gradient is zero: A of an adapter, for B begins as zero."""
    return name.endswith(_A)


def merged_parameters(model: PreTrainedModel, settings: Training) -> Iterator[tuple[str, Tensor]]:
    """Every parameter gathered, under its name without adapters; these are added in fp32.

    W + alpha / rank * B A (Hu et al. 2021, LoRA, section 4.1). A collective call where sharded.
    """
    held = dict(model.named_parameters())
    for name, parameter in held.items():
        if name.endswith((_A, _B)):
            continue
        weight = whole(parameter.detach())
        stem = name.partition(_INNER)[0]
        if isinstance(settings, Correct) and name == f"{stem}{_INNER}weight":
            lora = settings.lora or Lora()
            a, b = (whole(held[stem + end].detach()).float() for end in (_A, _B))
            weight = weight.float() + (lora.alpha / lora.rank) * (b @ a)
        yield name.replace(_INNER, "."), weight


def adapters_of(model: nn.Module) -> dict[str, Tensor]:
    """The adapters gathered, on the CPU, by name; a collective call where they are sharded."""
    return {
        name: whole(parameter.detach()).cpu()
        for name, parameter in model.named_parameters()
        if name.endswith((_A, _B))
    }


@torch.no_grad()
def check_merged(
    merged: Path, source: Path, settings: Correct, adapters: Mapping[str, Tensor], batch: Batch
) -> None:
    """GATE_PARITY unless the checkpoint `merged` says what `source` with its adapters says.

    One model after the other is in memory, in fp32 on the CPU; `batch` lies there.
    """
    beside = load_model(source)
    _add_adapters(beside, settings.lora or Lora(), seed=0)
    beside.load_state_dict(dict(adapters), strict=False)
    wanted = _logits(beside, batch)
    del beside
    found = _logits(load_model(merged), batch)
    difference = float((found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())
    limit = _LIMIT[Checkpoint.open(merged).dtype]
    if difference <= limit:  # false for NaN
        return
    raise ParetronError(
        Problem(
            Code.GATE_PARITY,
            f"the logits of the merged weights differ by {difference:.1e} of their root mean "
            f"square from those of the adapters, at most {limit:.0e} is rounding",
            where=str(merged),
            fix="report this with the versions that `paretron doctor` prints",
        )
    )


def _logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    logits = predict(model, batch).logits
    assert isinstance(logits, DeferredLogits)
    return logits.flat().logits().float()
