"""The criterion `fluctuation`: how much of what a unit gives is not its mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from paretron.artifacts.reader import Checkpoint
from paretron.artifacts.rows import row_blocks
from paretron.errors import Code, ParetronError, Problem
from paretron.families import Family, Tensor, sizes
from paretron.families.experts import PER_TOKEN
from paretron.importance.collect import enter
from paretron.importance.criteria.material import Importance, Material
from paretron.importance.executor import Batch, LayerStack
from paretron.importance.taps import Tap, find_taps, tapped

_STREAM = (("hidden",),)


def fluctuation(material: Material) -> Importance:
    """The variance of every input channel over all tokens times the squared norm of its weights.

    (WIFV of FLAP, arXiv 2312.11983, section 3.2; divided by n, over the tokens of all samples.)
    A neuron is one channel of the down projection, a head the sum of its channels of the output
    projection. FLAP leaves the other axes alone. Here an embedding channel is the sum over every
    matrix that reads the stream, the head included, of its variance as that matrix reads it; an
    expert's matrix weighs as much as the share of tokens that reach an expert. An expert is the
    variance of the norm of what it adds. Tokens that are not routed to an expert count as zeros.
    One more pass without lm_head. Errors: GATE_NONFINITE naming a module, INPUT_FAMILY.
    """
    checkpoint, stack = material.checkpoint, material.stack
    seen = _observed(checkpoint.family, checkpoint.config)
    sums = _Sums(tuple(s.tap for s in seen))
    with torch.no_grad(), tapped(stack.model, sums.taps, sums.add):
        groups = [material.batches] if stack.streamed else [[b] for b in material.batches]
        for group in groups:
            _forward(stack, group, sums, material)
    tokens = material.total(torch.tensor([float(sums.tokens)], dtype=torch.float64))
    found: dict[str, list[torch.Tensor]] = {}
    for one, moments in zip(seen, sums.moments, strict=True):
        mean, square = material.total(moments) / tokens
        values = (square - mean.square()).clamp(min=0) * one.weights(checkpoint)
        if one.tap.axis == "heads":
            values = values.view(one.tap.units, -1).sum(1)
        found.setdefault(one.tap.axis, []).append(values)
    units = {axis: torch.stack(values) for axis, values in found.items()}
    units["hidden"] = units["hidden"].sum(0, keepdim=True)
    return Importance(units)


@dataclass(frozen=True)
class _Seen:
    """A place that is observed, and the matrices that read it, each with its share of tokens."""

    tap: Tap
    matrices: tuple[tuple[str, float], ...]

    def weights(self, checkpoint: Checkpoint) -> torch.Tensor:
        """The squared norm of every column, fp64 [channels]; 1 where no matrix reads."""
        total = torch.zeros((), dtype=torch.float64)
        for name, share in self.matrices:
            for _, block in row_blocks(checkpoint.entries[name]):
                total = total + share * block.double().square().sum(0)
        return total if self.matrices else torch.ones((), dtype=torch.float64)


def _observed(family: Family, config: Mapping[str, Any]) -> list[_Seen]:
    """Every place, axis by axis and in layer order, as the taps of activations are."""
    taps = [t for t in find_taps(family, config) if t.axis != "hidden"]
    inside = [f"{t.name.removesuffix('.weight')}" for t in family.readers("moe_ffn")]
    numbers = [i for i in range(sizes(family, config)["layers"]) if _routes(family, config, i)]
    layer_of = dict(zip((t.module for t in taps if t.axis == "experts"), numbers, strict=True))
    found = []
    for tap in taps:
        names: list[str] = []
        if tap.axis == "moe_ffn":
            names = [f"{n.format(i=layer_of[tap.module], e=tap.expert)}.weight" for n in inside]
        elif tap.axis != "experts":
            names = [f"{tap.module}.weight"]
        found.append(_Seen(tap, tuple((name, 1.0) for name in names)))
    return [*found, *_stream(family, config)]


def _stream(family: Family, config: Mapping[str, Any]) -> Iterator[_Seen]:
    """What attention and MLP of every layer read, and the head."""
    size = sizes(family, config)
    for i in range(size["layers"]):
        readers = [t for t in family.rows(config, i) if len(t.dims) == 2 and t.dims[1] == _STREAM]
        for attention in (True, False):
            half = [t for t in readers if _has_heads(t) == attention]
            names = [
                (t.name.format(i=i, e=e), config[PER_TOKEN] / size["experts"])
                if t.per_expert
                else (t.name.format(i=i), 1.0)
                for t in half
                for e in (range(size["experts"]) if t.per_expert else (None,))
            ]
            module = _held_name(family, next(t for t in half if not t.per_expert)).format(i=i)
            tap = Tap("hidden", module.removesuffix(".weight"), "input", size["hidden"], 1)
            yield _Seen(tap, tuple(names))
    outside = family.rows(config, None)
    norm = next(t for t in outside if t.is_norm).name.removesuffix(".weight")
    head = [t.name for t in outside if len(t.dims) == 2][-1]  # a tied one is the embedding
    yield _Seen(Tap("hidden", norm, "output", size["hidden"], 1), ((head, 1.0),))


def _routes(family: Family, config: Mapping[str, Any], layer: int) -> bool:
    return any(t.per_expert for t in family.rows(config, layer))


def _has_heads(row: Tensor) -> bool:
    return any("kv_heads" in segment for segment in row.dims[0])


def _held_name(family: Family, row: Tensor) -> str:
    """The parameter in memory that a row on disk is."""
    return next((name for name, rows in family.held.items() if row.name in rows), row.name)


class _Sums:
    """Signed first and second moments of every channel, fp64 [2, channels] a tap."""

    def __init__(self, taps: tuple[Tap, ...]) -> None:
        self.taps = taps
        self.tokens = 0
        self.lengths: Sequence[int] = ()
        self.moments = [torch.zeros((2, t.units * t.channels), dtype=torch.float64) for t in taps]

    def add(self, number: int, activation: torch.Tensor, here: torch.Tensor | None = None) -> None:
        """Count what a place shows of one batch, without its padding."""
        flat = activation if activation.dim() == 2 else activation.flatten(0, 1)
        longest = (len(flat) if here is None else len(here)) // len(self.lengths)
        position = torch.arange(longest, device=flat.device)
        valid = torch.cat([position < length for length in self.lengths])
        values = flat[valid if here is None else valid[here]].double()
        sums = torch.stack((values.sum(0), values.square().sum(0))).cpu()
        if not bool(torch.isfinite(sums).all()):
            raise ParetronError(
                Problem(
                    Code.GATE_NONFINITE,
                    "its activations are NaN or infinite",
                    where=self.taps[number].module,
                    fix="check the checkpoint's weights, or score in a wider dtype",
                )
            )
        self.moments[number] += sums


def _forward(stack: LayerStack, batches: Sequence[Batch], sums: _Sums, material: Material) -> None:
    """Each layer takes all batches of a group; their hidden states wait under their number."""
    with material.states() as states:
        prepared = enter(stack, batches, states)
        for i in range(len(stack)):
            with stack.loaded(i):
                for k, batch in enumerate(batches):
                    sums.lengths = batch.lengths
                    states[0, k] = stack.run_layer(i, prepared[k], states[0, k])
        for k, batch in enumerate(batches):
            sums.lengths = batch.lengths
            sums.tokens += sum(batch.lengths)
            stack.final_norm(states[0, k])
