"""Loss and perplexity of a checkpoint on held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name everyone knows it by
from transformers import PreTrainedModel

from paretron.artifacts.jsonfile import dump
from paretron.artifacts.manifest import Provenance
from paretron.artifacts.models import load_model
from paretron.artifacts.staging import staged
from paretron.data.store import TokenStore
from paretron.errors import Code, ParetronError, Problem
from paretron.families import LogitRule, family_of, logit_rule
from paretron.recipe import Evaluate

OnEvent = Callable[[str, Mapping[str, object]], None]

EVALUATION = "evaluation.json"
_LOGITS_AT_ONCE = 1 << 24  # elements: 64 MB in float32, whatever the vocabulary
_MAX_LOSS = 700.0  # exp of more is no float


@dataclass(frozen=True)
class Loss:
    """Mean negative log-likelihood in nats over `tokens` predicted tokens, and its exponential."""

    loss: float
    perplexity: float
    tokens: int


def evaluate_model(
    model: Path,
    stores: Mapping[str, tuple[Path, int]],
    *,
    settings: Evaluate,
    out: Path,
    provenance: Provenance,
    overwrite: bool = False,
    on_event: OnEvent,
) -> dict[str, Loss]:
    """Measure a checkpoint on every text and publish evaluation.json at `out`.

    `stores` maps a text's name to its token store and seq_len. In float32, on the first GPU if
    there is one. Errors: INPUT_CORPUS (not one window), GATE_NONFINITE, GATE_PREFLIGHT.
    """
    opened = {name: (TokenStore.open(path), seq_len) for name, (path, seq_len) in stores.items()}
    counts = {name: store.windows(seq_len) for name, (store, seq_len) in opened.items()}
    with staged(out, provenance=provenance, overwrite=overwrite) as folder:
        network = load_model(model).to("cuda" if torch.cuda.is_available() else "cpu")
        check_chunked_logits(network)
        found: dict[str, Loss] = {}
        done, total = 0, sum(counts.values())
        for name, (store, seq_len) in opened.items():
            batches = _batches(store, seq_len, settings.micro_batch)
            nats, tokens = 0.0, 0
            for ids in batches:
                nats += summed_loss(network, ids)
                tokens += ids.shape[0] * (seq_len - 1)
                done += ids.shape[0]
                on_event("progress", {"done": done, "total": total, "unit": "windows"})
            found[name] = _mean(nats, tokens, where=f"{model}: {name}")
            on_event("eval", {"text": name, "loss": found[name].loss})
        dump(folder / EVALUATION, {name: asdict(loss) for name, loss in found.items()})
    return found


@torch.inference_mode()
def summed_loss(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Sum over ids[:, 1:] of -log p(token | tokens before), in nats; ids int64 [batch, seq_len].

    Logits exist for a bounded number of positions at a time; the sum is kept in float64.
    """
    ids = ids.to(model.device)
    hidden = _hidden(model, ids)[:, :-1].flatten(0, 1)  # [batch * (seq_len - 1), hidden]
    targets = ids[:, 1:].flatten()
    head, rule = model.get_output_embeddings(), _logit_rule(model)
    positions = max(1, _LOGITS_AT_ONCE // model.config.vocab_size)
    total = torch.zeros((), dtype=torch.float64)
    for h, t in zip(hidden.split(positions), targets.split(positions), strict=True):
        logits = rule(head(h).float())
        total += F.cross_entropy(logits, t, reduction="none").double().sum().cpu()
    return float(total)


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


def _batches(store: TokenStore, seq_len: int, micro_batch: int) -> Iterator[torch.Tensor]:
    count = store.windows(seq_len)
    for first in range(0, count, micro_batch):
        last = min(first + micro_batch, count)
        yield torch.stack([store.window(i, seq_len) for i in range(first, last)])


def _mean(nats: float, tokens: int, *, where: str) -> Loss:
    if tokens == 0:
        raise ParetronError(
            Problem(
                Code.INPUT_CORPUS,
                "windows of one token predict nothing",
                where=where,
                fix="a seq_len of at least 2",
            )
        )
    loss = nats / tokens
    if not loss <= _MAX_LOSS:  # NaN too
        raise ParetronError(
            Problem(
                Code.GATE_NONFINITE,
                f"the loss is {loss} nats a token",
                where=where,
                fix="use a checkpoint whose training did not diverge",
            )
        )
    return Loss(loss, math.exp(loss), tokens)
