"""A transformers model taken apart: what every layer receives, one layer at a time.

The model's own code prepares embeddings, masks and rotary angles; its layers are then called one
by one, in any order and number. This is how depth is measured with shared prefixes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from paretron.families import Family, logit_rule

# Logits held at a time while a loss is taken: bounds memory, whatever the vocabulary.
_LOGITS_AT_ONCE = 1 << 24

Part = int | Literal["embeddings", "head"]  # of a model; a number is a layer's


@dataclass(frozen=True)
class Batch:
    """Samples of one forward pass: `ids_BT` padded on the right, the first `lengths` count."""

    ids_BT: torch.Tensor
    lengths: tuple[int, ...]

    @property
    def num_targets(self) -> int:
        """Tokens that have one before them."""
        return sum(self.lengths) - len(self.lengths)

    def targets(self) -> torch.Tensor:
        """[B, T - 1]: the next token of every position but the last, -100 where that is padding."""
        targets = self.ids_BT[:, 1:].clone()
        for row, length in zip(targets, self.lengths, strict=True):
            row[length - 1 :] = -100
        return targets


@dataclass(frozen=True)
class Prepared:
    """One batch before its first layer: hidden states, and each layer's other arguments."""

    hidden_BTD: torch.Tensor
    arguments: tuple[Mapping[str, Any], ...]

    def without_hidden(self) -> Prepared:
        """The arguments alone, for hidden states that are kept elsewhere."""
        return Prepared(self.hidden_BTD.new_empty(0), self.arguments)


class _AllSeen(Exception):
    """Every layer's arguments are known."""


class _Recorder(nn.Module):
    """Stands where a layer stands, and notes what it is called with."""

    def __init__(self, seen: list[tuple[torch.Tensor, dict[str, Any]]], *, last: bool) -> None:
        super().__init__()
        self._seen = seen
        self._last = last

    def forward(self, hidden_BTD: torch.Tensor, **arguments: Any) -> torch.Tensor:
        self._seen.append((hidden_BTD, arguments))
        if self._last:
            raise _AllSeen  # what follows, the final norm, is not wanted yet
        return hidden_BTD


class LayerStack:
    """The layers, final norm and head of a model, found through its family's table."""

    def __init__(self, model: PreTrainedModel, family: Family) -> None:
        first = next(t for t in family.tensors if t.per_layer).name
        norm = next(t for t in family.tensors if t.is_norm and not t.per_layer).name
        self._layers_name = first.split(".{i}.")[0]
        self._norm_name = norm.removesuffix(".weight")
        self.model = model
        self.family = family
        base_name, _, self._layers_key = self._layers_name.rpartition(".")
        self._base = model.get_submodule(base_name)
        self.layers: list[nn.Module] = list(model.get_submodule(self._layers_name).children())
        self._norm = model.get_submodule(self._norm_name)
        self._logit_rule = logit_rule(family, model.config.to_dict())

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def streamed(self) -> bool:
        """Whether weights come and go, so that all samples should pass a layer together."""
        return False

    def loaded(self, part: Part) -> AbstractContextManager[None]:
        """While open, the part's weights are in memory; here they always are.

        `prepare` needs "embeddings", `run_layer` its number, logits and losses need "head", and
        `final_norm` none.
        """
        return nullcontext()

    def prepare(self, ids_BT: torch.Tensor) -> Prepared:
        """Everything that comes before the first layer, by the model's own code.

        Sequences are padded on the right: under a causal mask that changes no valid position.
        """
        return self._prepared(input_ids=ids_BT)

    def prepare_embedded(self, embedded_BTD: torch.Tensor) -> Prepared:
        """The same from the embedding's rows, for who looks them up without the whole matrix."""
        return self._prepared(inputs_embeds=embedded_BTD)

    def _prepared(self, **given: torch.Tensor) -> Prepared:
        seen: list[tuple[torch.Tensor, dict[str, Any]]] = []
        count = len(self.layers)
        recorders = nn.ModuleList(_Recorder(seen, last=i == count - 1) for i in range(count))
        with self._layers_replaced(recorders), suppress(_AllSeen):
            self._base(**{k: t.to(self.device) for k, t in given.items()}, use_cache=False)
        return Prepared(seen[0][0], tuple(arguments for _, arguments in seen))

    def run_layer(self, number: int, prepared: Prepared, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """The layer's output for these hidden states, [B, T, D]."""
        out: torch.Tensor = self.layers[number](hidden_BTD, **prepared.arguments[number])
        return out

    def final_norm(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """The model's last norm, [B, T, D]."""
        out: torch.Tensor = self._norm(hidden_BTD)
        return out

    def logits(self, states_ND: torch.Tensor) -> torch.Tensor:
        """fp32 logits [N, vocab] of what `final_norm` gave; the caller bounds N."""
        return self._logit_rule(self.model.get_output_embeddings()(states_ND).float())

    def log_likelihoods(
        self, states_ND: torch.Tensor, targets_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each target after its state (as `final_norm` gave it): its log-probability in nats,
        and whether no token is likelier; both [N]."""
        found, likeliest = [], []
        targets, rows = targets_N.to(self.device), self._rows_at_once
        for part, target in zip(states_ND.split(rows), targets.split(rows), strict=True):
            logits = self.logits(part)
            found.append(-nn.functional.cross_entropy(logits, target, reduction="none"))
            likeliest.append(logits.argmax(-1) == target)
        return torch.cat(found), torch.cat(likeliest)

    @property
    def _rows_at_once(self) -> int:
        return max(1, _LOGITS_AT_ONCE // int(self.model.config.vocab_size))

    def loss_sum(self, hidden_BTD: torch.Tensor, targets_BT: torch.Tensor) -> float:
        """Summed next-token loss in nats of the last layer's output, [B, T - 1] targets."""
        states = self.final_norm(hidden_BTD)[:, :-1].flatten(0, 1)
        targets = targets_BT.flatten().to(self.device)
        total, rows = 0.0, self._rows_at_once
        for part, target in zip(states.split(rows), targets.split(rows), strict=True):
            losses = nn.functional.cross_entropy(self.logits(part), target, reduction="none")
            total += float(losses.sum(dtype=torch.float64))
        return total

    @contextmanager
    def _layers_replaced(self, layers: nn.ModuleList) -> Iterator[None]:
        own = self._base.get_submodule(self._layers_key)
        setattr(self._base, self._layers_key, layers)
        try:
            yield
        finally:
            setattr(self._base, self._layers_key, own)
