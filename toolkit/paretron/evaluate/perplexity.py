"""Loss and perplexity of a model on held-out text, in total and by unit of the text."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name everyone knows it by
from transformers import PreTrainedModel

from paretron.data.store import TokenStore
from paretron.errors import Code, ParetronError, Problem
from paretron.evaluate.intervals import ratio_interval
from paretron.evaluate.spans import Span, Spans, spans_of, stride_of
from paretron.families import LogitRule, family_of, logit_rule
from paretron.recipe import Evaluate

OnEvent = Callable[[str, Mapping[str, object]], None]

_LOGITS_AT_ONCE = 1 << 24  # elements: 64 MB in float32, whatever the vocabulary
_SORTED = 512  # so many spans are put in order of length, that batches of documents pad little
_MAX_LOSS = 700.0  # exp of more is no float


class Reader(Protocol):
    """A model that reads tokens and says how likely it finds them."""

    def nats(self, rows: Sequence[torch.Tensor], scored: Sequence[int]) -> list[float]:
        """Of each row of token ids, int64 [length], the sum of -log p over its last `scored`."""


@dataclass(frozen=True)
class Loss:
    """Mean negative log-likelihood in nats over `tokens` predicted tokens, and its exponential.

    `low` and `high` are the ends of the loss's 95 % interval over units, which are windows (of
    those that slide, blocks as long) or documents, by `per`; None where there is but one unit.
    """

    loss: float
    perplexity: float
    tokens: int
    low: float | None
    high: float | None
    per: str


@dataclass(frozen=True)
class Units:
    """What every unit of a text cost, in the text's order: nats over how many tokens.

    `text` is a hash over the tokens of every span: where it and `tokens` are equal, units pair.
    """

    per: str
    seq_len: int
    stride: int | None
    text: str
    nats: tuple[float, ...]
    tokens: tuple[int, ...]

    def as_json(self) -> dict[str, Any]:
        """What windows.json holds of a text."""
        return asdict(self)


@dataclass(frozen=True)
class Text:
    """A text's tokens and how they are cut."""

    store: TokenStore
    seq_len: int
    stride: int | None
    spans: Spans


def open_texts(stores: Mapping[str, tuple[Path, int]], *, settings: Evaluate) -> dict[str, Text]:
    """Every text by its name; `stores` gives its token store and seq_len.

    Errors: INPUT_CORPUS (not one whole window), RECIPE_VALUE (a stride that leaves no context).
    """
    found = {}
    for name, (path, seq_len) in stores.items():
        store = TokenStore.open(path)
        stride = None if settings.by == "window" else stride_of(seq_len, settings)
        found[name] = Text(store, seq_len, stride, spans_of(store, seq_len, settings))
    return found


def measure_texts(
    reader: Reader,
    texts: Mapping[str, Text],
    *,
    settings: Evaluate,
    where: str,
    on_event: OnEvent,
) -> dict[str, tuple[Loss, Units]]:
    """Loss on every text; INPUT_CORPUS (nothing that can be predicted), GATE_NONFINITE."""
    done, total = 0, sum(sum(1 for _ in text.spans()) for text in texts.values())
    found: dict[str, tuple[Loss, Units]] = {}
    for name, text in texts.items():
        read, nats = [], []
        for spans in _batches(text.spans, settings.micro_batch):
            rows = [text.store.tokens(span.first, span.length) for span in spans]
            nats += reader.nats(rows, [span.scored for span in spans])
            read += spans
            done += len(spans)
            on_event("progress", {"done": done, "total": total, "unit": "windows"})
        which = [span.unit for span in read]
        units = Units(
            settings.by,
            text.seq_len,
            text.stride,
            _identity(text),
            tuple(np.bincount(which, weights=nats).tolist()),
            tuple(np.bincount(which, weights=[s.scored for s in read]).astype(int).tolist()),
        )
        found[name] = _mean(units, where=f"{where}: {name}"), units
        on_event("eval", {"text": name, "loss": found[name][0].loss})
    return found


def _batches(spans: Spans, micro_batch: int) -> Iterator[list[Span]]:
    """Spans of about one length together; all of one length keep their order."""
    remaining = spans()
    while part := sorted(islice(remaining, _SORTED), key=lambda span: span.length):
        for first in range(0, len(part), micro_batch):
            yield part[first : first + micro_batch]


def _identity(text: Text) -> str:
    """The hash of all that is read, span by span."""
    digest = hashlib.sha256()
    for span in text.spans():
        digest.update(text.store.tokens(span.first, span.length).numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _mean(units: Units, *, where: str) -> Loss:
    tokens = sum(units.tokens)
    if tokens == 0:
        raise ParetronError(
            Problem(
                Code.INPUT_CORPUS,
                "windows or documents of one token predict nothing",
                where=where,
                fix="more text, and a seq_len of at least 2",
            )
        )
    loss, low, high = ratio_interval(units.nats, units.tokens)
    if not loss <= _MAX_LOSS:  # NaN too
        raise ParetronError(
            Problem(
                Code.GATE_NONFINITE,
                f"the loss is {loss} nats a token",
                where=where,
                fix="use a checkpoint whose training did not diverge",
            )
        )
    return Loss(loss, math.exp(loss), tokens, low, high, units.per)


# ---- a model of ours


@dataclass(frozen=True)
class NetworkReader:
    """A checkpoint that transformers runs."""

    network: PreTrainedModel

    def nats(self, rows: Sequence[torch.Tensor], scored: Sequence[int]) -> list[float]:
        """Rows are padded at their end, where no token that counts looks."""
        ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        counts = torch.zeros(ids.shape[0], ids.shape[1] - 1, dtype=torch.bool)
        for row, (tokens, last) in enumerate(zip(rows, scored, strict=True)):
            counts[row, len(tokens) - 1 - last : len(tokens) - 1] = True
        losses = token_losses(self.network, ids, counts).double()
        return [float(part.sum()) for part in losses.split(list(scored))]


def summed_loss(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Sum over ids[:, 1:] of -log p(token | tokens before), in nats; ids int64 [batch, seq_len]."""
    counts = torch.ones(ids.shape[0], ids.shape[1] - 1, dtype=torch.bool)
    return float(token_losses(model, ids, counts).double().sum())


@torch.inference_mode()
def token_losses(model: PreTrainedModel, ids: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """-log p(token | tokens before) of those ids[:, 1:] that count, in nats, row by row.

    ids int64 [batch, seq_len], counts bool [batch, seq_len - 1]; float32 on the CPU. Logits exist
    for a bounded number of positions at a time.
    """
    ids, counts = ids.to(model.device), counts.to(model.device)
    hidden = _hidden(model, ids)[:, :-1][counts]  # [counted, hidden]
    targets = ids[:, 1:][counts]
    head, rule = model.get_output_embeddings(), _logit_rule(model)
    positions = max(1, _LOGITS_AT_ONCE // model.config.vocab_size)
    losses = [
        F.cross_entropy(rule(head(h).float()), t, reduction="none").cpu()
        for h, t in zip(hidden.split(positions), targets.split(positions), strict=True)
    ]
    return torch.cat(losses)


@torch.inference_mode()
def check_chunked_logits(model: PreTrainedModel) -> None:
    """GATE_PREFLIGHT unless the head over hidden states, capped and divided as the family's table
    says, is what the model itself calls its logits."""
    ids = torch.arange(8, device=model.device)[None] % model.config.vocab_size
    expected = model(input_ids=ids, use_cache=False).logits.float()
    chunked = _logit_rule(model)(model.get_output_embeddings()(_hidden(model, ids)).float())
    if not torch.allclose(chunked, expected, rtol=1e-3, atol=1e-4):
        raise ParetronError(
            Problem(
                Code.GATE_PREFLIGHT,
                f"the logits of {type(model).__name__} are more than its head over hidden states",
                where="evaluate",
                fix="name the config keys of its logit scale and cap in the family's table",
            )
        )


def _logit_rule(model: PreTrainedModel) -> LogitRule:
    config = model.config.to_dict()
    return logit_rule(family_of(config), config)


def _hidden(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The final norm's output, [batch, seq_len, hidden]."""
    out: Any = model.get_decoder()(input_ids=ids, use_cache=False)
    hidden: torch.Tensor = out.last_hidden_state
    return hidden
