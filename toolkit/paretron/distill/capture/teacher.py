"""A teacher that is not in memory: what it said of each window is read back."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch

from paretron.artifacts.config import read_config
from paretron.data.store import TokenStore
from paretron.data.tokenizer import tokenizer_sha256
from paretron.distill.batches import Batch
from paretron.distill.capture.cache import DTYPES, Cache
from paretron.distill.fused import DeferredLogits
from paretron.distill.job import store_identity
from paretron.distill.objective import Prediction
from paretron.distill.states import Place
from paretron.errors import Code, ParetronError, Problem
from paretron.families.logits import LogitRule
from paretron.recipe.training import Loss, States


class CapturedTeacher:
    """Predictions for the windows of one text: the likeliest tokens, or logits by its own head."""

    places: tuple[Place, ...] = ()

    def __init__(self, cache: Cache, device: torch.device) -> None:
        """Errors: those of `Cache.head`."""
        self.cache = cache
        header = cache.header
        self._head = self._bias = None
        if header.hidden is not None:
            head, bias = cache.head()
            self._head, self._bias = head.to(device), None if bias is None else bias.to(device)
        self._rule = LogitRule(header.divisor, header.softcap)

    def predict(self, batch: Batch) -> Prediction:
        """What was captured of the batch's windows; INPUT_MANIFEST where it cannot be read."""
        header = self.cache.header
        records = torch.stack([self.cache.window(i) for i in batch.window_ids])
        if self._head is not None:
            hidden = records.view(DTYPES[header.dtype]).to(self._head.device, non_blocking=True)
            return Prediction(DeferredLogits(hidden, self._head, self._rule, self._bias))
        records = records.to(batch.input_ids.device, non_blocking=True)
        try:
            top = header.codec.decode(records.flatten(0, 1))
        except ValueError as error:
            raise ParetronError(
                Problem(
                    Code.INPUT_MANIFEST,
                    f"windows {list(batch.window_ids)}: {error}",
                    where=str(self.cache.folder),
                    fix="capture again",
                )
            ) from error
        return Prediction(top.shaped(*records.shape[:2]))


def check_capture(
    folder: Path,
    *,
    student: Path,
    tokens: Path,
    seq_lens: Collection[int],
    apart: bool,
    loss: Loss,
    hashes: bool,
) -> None:
    """Refuse a capture of another text or for another loss, before a weight is read.

    `seq_lens` are those of all phases. Errors: those of `Cache.open` and `Cache.refuse_another`,
    RECIPE_VALUE for a loss that needs more of the teacher.
    """
    cache = Cache.open(folder, hashes=hashes)
    if (loss.states or States()) != States():
        raise ParetronError(
            Problem(
                Code.RECIPE_VALUE,
                "intermediate states were not captured",
                where="distill.loss.states",
                fix="leave them out, or train with the teacher itself",
            )
        )
    store = TokenStore.open(tokens)
    for seq_len in sorted(seq_lens):
        cache.refuse_another(
            tokens=store_identity(tokens),
            tokenizer=tokenizer_sha256(student),
            vocab_size=read_config(student)["vocab_size"],
            seq_len=seq_len,
            num_windows=store.windows(seq_len),
            apart=apart,
            loss=loss,
        )
