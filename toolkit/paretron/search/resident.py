"""Losses of many pruned shapes from one model's weights, which are read and ranked once.

Every axis of the resident weights is put into the order of importance, and the residual stream
into its principal components where students are rotated, which changes nothing that the model
computes. What a shape keeps is then the front part of every axis: a view, shared by all shapes that
keep as many. Only query heads that merge, or go inside of their KV group, need a copy; it serves
all shapes with as many heads. Nothing is refitted.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from paretron.artifacts.config import DTYPE_NAMES, servable_config
from paretron.artifacts.models import as_library_config, load_model
from paretron.artifacts.reader import Checkpoint
from paretron.compensate.decide import Decision
from paretron.families import Sizes, Tensor, family_of, sizes
from paretron.families.table import with_sizes
from paretron.importance.collect import batches_of
from paretron.importance.executor import Batch, LayerStack
from paretron.importance.scores import Scores, rank
from paretron.recipe import Prune, Score
from paretron.search.rotated import Rotation, principal_rotation
from paretron.surgery.heads import merged_slice
from paretron.surgery.postnorms import balanced_norm
from paretron.surgery.prune import write_pruned
from paretron.surgery.selection import HeadRanks, choose
from paretron.surgery.slicing import Kept, slice_tensor


class PrunedModels(Protocol):
    """Where the models of many shapes come from."""

    def model(self, size: Sizes) -> PreTrainedModel:
        """The model that pruning to these sizes gives, in eval mode on its device."""


def pruned_models(
    checkpoint: Checkpoint,
    scores: Scores,
    *,
    score: Score,
    prune: Prune,
    decision: Decision,
    calibration: Sequence[Batch],
) -> PrunedModels:
    """Slices of one resident model; with experts, whose order is not one, really pruned ones.

    `decision` is about the narrowest student. Where it rotates, so do the slices, by `calibration`,
    unless the basis of every width is another: of LayerNorm, and where a head is untied.
    """
    merge_heads = decision.merges_heads(prune.merge_heads)
    if "experts" in sizes(checkpoint.family, checkpoint.config):
        return Written(
            checkpoint, scores, score, prune.model_copy(update={"merge_heads": merge_heads})
        )
    rotation = None
    if decision.rotate and not decision.untie and checkpoint.family.norm == "rms":
        rotation = principal_rotation(on_device(load_model(checkpoint.path)), calibration)
    return Resident(checkpoint, scores, score=score, merge_heads=merge_heads, rotation=rotation)


@dataclass(frozen=True)
class Written:
    """Every shape pruned to a folder of its own and loaded from there."""

    checkpoint: Checkpoint
    scores: Scores
    score: Score
    prune: Prune

    def model(self, size: Sizes) -> PreTrainedModel:
        """The pruned model; its folder is gone by then."""
        selection = choose(self.scores, sizes=size, score=self.score)
        with tempfile.TemporaryDirectory(prefix="paretron-") as place:
            folder = Path(place)
            write_pruned(self.checkpoint, selection, folder, sizes=size, prune=self.prune)
            return on_device(load_model(folder))


class Resident:
    """One model's weights in the order of importance, on the CPU."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        scores: Scores,
        *,
        score: Score,
        merge_heads: bool,
        rotation: Rotation | None = None,
    ) -> None:
        """Read, order and turn every weight once; without a rotation channels are chosen."""
        self.family, self.config = checkpoint.family, checkpoint.config
        self.have = sizes(self.family, self.config)
        self._rotation = rotation
        self._checkpoint, self._merge_heads = checkpoint, merge_heads
        self._scores, self._score = scores, score
        on_cpu = not torch.cuda.is_available()
        own = getattr(torch, DTYPE_NAMES[checkpoint.dtype])
        self.dtype: torch.dtype = torch.float32 if on_cpu else own
        self._weights: dict[str, torch.Tensor] = {}
        for row in self.family.rows(self.config, None):
            self._weights[row.name] = self._ordered(checkpoint, row, None)
        for i in range(self.have["layers"]):
            for row in self.family.rows(self.config, i):
                self._weights[row.name.format(i=i)] = self._ordered(checkpoint, row, i)
        self._heads: tuple[int, int] = (0, 0)  # whose copies are held
        self._copies: dict[str, torch.Tensor] = {}

    def model(self, size: Sizes) -> PreTrainedModel:
        """The model that pruning to these sizes would give, on slices of the resident weights.

        Errors: RECIPE_TARGET when the scores do not say which layers go.
        """
        layers = choose(self._scores, sizes=size, score=self._score).layers
        whole = len(layers) == self.have["layers"]
        config = with_sizes(self.family, self.config, size, kept_layers=None if whole else layers)
        state: dict[str, torch.Tensor] = {}
        for row in self.family.rows(config, None):
            state[row.name] = self._sliced(row, None, size)
        for new, old in enumerate(layers):
            for row in self.family.rows(config, new):
                state[row.name.format(i=new)] = self._sliced(row, old, size)
        name = str(self.dtype).removeprefix("torch.")
        full = servable_config(config, dtype=name)
        library = as_library_config(full, where="the pruned config")
        model: PreTrainedModel = MODEL_FOR_CAUSAL_LM_MAPPING[type(library)].from_pretrained(
            None, config=library, state_dict=state, dtype=self.dtype
        )
        return on_device(model).eval()

    def _ordered(self, checkpoint: Checkpoint, row: Tensor, layer: int | None) -> torch.Tensor:
        tensor = checkpoint.read(row.name.format(i=layer))
        kept = dict(self._order(layer))
        if self._rotation is not None:
            del kept["hidden"]
            tensor = self._rotation.turned(tensor, row, layer, checkpoint)
        return slice_tensor(tensor, row, sizes=self.have, kept=kept).to(self.dtype)

    def _order(self, layer: int | None) -> Kept:
        """Every unit of every axis from the most to the least important."""
        how: Mapping[str, Any] = {"batch": self._score.batch, "sequence": self._score.sequence}
        shared = {"hidden": self._scores.ranking("hidden", **how)}
        if layer is None:
            return shared
        heads = self._scores.values("heads", layer, **how)
        groups = self._scores.ranking("kv_heads", layer, **how)
        return {
            **shared,
            "ffn": self._scores.ranking("ffn", layer, **how),
            "kv_heads": groups,
            "q_per_kv": rank(heads.view(self.have["kv_heads"], self.have["q_per_kv"])[groups]),
        }

    def _sliced(self, row: Tensor, layer: int | None, size: Sizes) -> torch.Tensor:
        """The front part of a weight: heads first, whose copies are held, then views of those."""
        heads = (size["kv_heads"], size["q_per_kv"])
        if heads != self._heads:
            self._heads, self._copies = heads, {}
        name = row.name.format(i=layer)
        if self._rotation is not None and row.is_norm:
            return self._rotation.norm(name, size["hidden"], family=self.family).to(self.dtype)
        if layer is not None and name not in self._copies:
            self._copies[name] = self._heads_cut(self._weights[name], row, size)
        tensor = self._weights[name] if layer is None else self._copies[name]
        front = {a: torch.arange(size[a]) for a in ("hidden", "ffn") if size[a] < self.have[a]}
        now = {**self.have, "kv_heads": heads[0], "q_per_kv": heads[1]}
        cut = slice_tensor(tensor, row, sizes=now, kept=front)
        if not self.family.post_norms:
            return cut
        channels = self._order(None)["hidden"][: size["hidden"]]
        return balanced_norm(
            cut, row=row, source=name, checkpoint=self._checkpoint, kept={"hidden": channels}
        )

    def _heads_cut(self, tensor: torch.Tensor, row: Tensor, size: Sizes) -> torch.Tensor:
        """A weight with the size's heads and all else; the weight itself where it has none."""
        groups, queries = size["kv_heads"], size["q_per_kv"]
        kept: dict[str, torch.Tensor] = {}
        if groups < self.have["kv_heads"]:
            kept["kv_heads"] = torch.arange(groups)
        if queries < self.have["q_per_kv"]:
            kept["q_per_kv"] = torch.arange(queries).expand(groups, queries)
        if not self._merge_heads:
            return slice_tensor(tensor, row, sizes=self.have, kept=kept)
        alone = self.have["q_per_kv"] == 1
        ranks = HeadRanks(
            torch.arange(self.have["q_per_kv"]).expand(groups, self.have["q_per_kv"]),
            torch.arange(self.have["kv_heads"]) if alone else None,
        )
        return merged_slice(tensor, row, sizes=self.have, kept=kept, ranks=ranks)


def on_device(model: PreTrainedModel) -> PreTrainedModel:
    """The model on the first GPU, where there is one."""
    if torch.cuda.is_available():
        torch.nn.Module.to(model, torch.device("cuda"))
    return model


@torch.no_grad()
def mean_loss(
    model: PreTrainedModel, windows: Sequence[torch.Tensor], *, micro_batch: int
) -> float:
    """Mean next-token loss in nats of a model on windows of token ids."""
    stack = LayerStack(model, family_of(model.config.to_dict()))
    nats, tokens = 0.0, 0
    for batch in batches_of(windows, micro_batch):
        prepared = stack.prepare(batch.ids_BT)
        hidden = prepared.hidden_BTD
        for i in range(len(stack)):
            hidden = stack.run_layer(i, prepared, hidden)
        nats += stack.loss_sum(hidden, batch.targets())
        tokens += batch.num_targets
    return nats / tokens if tokens else math.nan
