"""A teacher from scratch: tokenizer, random weights, plain language-model training, a cache."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from paretron.artifacts.config import DTYPE_NAMES, servable_config
from paretron.artifacts.manifest import Provenance
from paretron.artifacts.staging import locked, staged
from paretron.families import family_of
from paretron.recipe import Pretrain
from paretron.run.memory import cache_root
from paretron.run.runner import Context
from paretron.run.texts import build_store
from paretron.run.workspace import is_done


def pretrained_teacher(context: Context) -> None:
    """Train the recipe's teacher, or take the one of an earlier run with equal settings."""
    pretrain = context.recipe.teacher.pretrain
    if pretrain is None:
        raise ValueError("a given teacher is not pretrained")
    if context.provenance.stamp is not None:  # a rehearsal's teacher is of no use to anybody
        _train(context, pretrain, out=context.out)
        return
    wanted = context.provenance.stage
    key = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:24]
    cached = cache_root() / "teachers" / key
    if is_done(cached, wanted, overwrite=False):
        context.on_event("note", {"message": f"taken from the cache, {cached}"})
    else:
        _train(context, pretrain, out=cached)
    _copy(cached, context.out)


def _train(context: Context, pretrain: Pretrain, *, out: Path) -> None:
    from paretron.data.sources import read_documents
    from paretron.data.tokenizer import train_tokenizer
    from paretron.distill.stage import train

    state = out.with_name(f".{out.name}.state")
    seed = context.recipe.seed
    with locked(out.with_name(f".{out.name}.training"), what=str(out)):
        start = state / "start"
        if not start.is_dir():
            context.on_event("note", {"message": "training the tokenizer"})
            tokenizer = state / "tokenizer"
            shutil.rmtree(state, ignore_errors=True)
            tokenizer.mkdir(parents=True)
            parts = (read_documents(p, offline=context.offline) for p in pretrain.data.parts)
            documents = chain.from_iterable(parts)
            train_tokenizer(documents, pretrain.tokenizer.vocab_size, tokenizer)
            config = pretrain.config | {"vocab_size": pretrain.tokenizer.vocab_size}
            write_random_model(config, start, companions=tokenizer, dtype="F32", seed=seed)
        tokens = state / "tokens"
        if not tokens.is_dir():
            with staged(tokens, provenance=Provenance(kind="tokens")) as folder:
                build_store(
                    pretrain.data,
                    folder / "train",
                    tokenizer=start,
                    max_tokens=pretrain.data.tokens,
                    offline=context.offline,
                )
        train(
            start,
            tokens / "train",
            teacher=None,
            settings=pretrain,
            seq_len=pretrain.data.seq_len,
            validation_tokens=None,
            validation_seq_len=pretrain.data.seq_len,
            seed=seed,
            out=out,
            state=state / "training",
            provenance=context.provenance,
            overwrite=False,
            apart=pretrain.data.documents == "apart",
            on_event=context.on_event,
        )
        shutil.rmtree(state, ignore_errors=True)


def write_random_model(
    config: Mapping[str, Any],
    folder: Path,
    *,
    companions: Path,
    dtype: str,
    seed: int,
    stamp: str | None = None,
) -> None:
    """Publish a checkpoint of a config with seeded random weights (the library's own scheme)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from paretron.artifacts.models import load_tokenizer, save_model

    tokenizer = load_tokenizer(companions)
    ids = {
        name: getattr(tokenizer, name)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        if getattr(tokenizer, name) is not None
    }
    full = servable_config(
        {"architectures": [family_of(config).architecture], **config, **ids},
        dtype=DTYPE_NAMES[dtype],
    )
    kind = AutoConfig.for_model(**full)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(kind, dtype=getattr(torch, DTYPE_NAMES[dtype]))
    provenance = Provenance(kind="random", settings={"config": full}, seed=seed, stamp=stamp)
    with staged(folder, provenance=provenance) as out:
        save_model(model, out, config=full, companions=companions)


def _copy(source: Path, target: Path) -> None:
    """Copy a published artifact whole: the manifest's hash, and so its identity, stays."""
    target.parent.mkdir(parents=True, exist_ok=True)
    half = target.with_name(f".{target.name}.copying")
    shutil.rmtree(half, ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, half)
    os.rename(half, target)
