"""Parameters as transformers holds them against tensors as they lie on disk.

Most have one name in both places. Experts are a tensor each on disk and one stacked parameter in
memory; a family's table says what is made of what, and nothing here computes: bits only move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from paretron.families import Family, expected_tensors, placed_tensors, sizes


@dataclass(frozen=True)
class Held:
    """One parameter in memory: `parts[e]` are the tensors on disk of expert e, joined in order.

    A parameter that is not `stacked` over experts is the one tensor `parts[0][0]`.
    """

    name: str
    parts: tuple[tuple[str, ...], ...]
    lengths: tuple[int, ...]  # of the parts of one expert, along the dimension in which they join
    stacked: bool

    def from_disk(self, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """The parameter, made of the tensors that `read` gives."""
        if not self.stacked:
            return read(self.parts[0][0])
        flat = torch.cat([read(name) for names in self.parts for name in names])
        return flat.unflatten(0, (len(self.parts), sum(self.lengths)))

    def to_disk(self, parameter: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and tensors on disk of a parameter; views of it."""
        if not self.stacked:
            yield self.parts[0][0], parameter
            return
        for names, expert in zip(self.parts, parameter, strict=True):
            yield from zip(names, expert.split(self.lengths), strict=True)


def held_parameters(family: Family, config: Mapping[str, Any]) -> tuple[Held, ...]:
    """Every parameter of a model in execution order, as transformers holds it."""
    size = sizes(family, config)
    holder = {row: name for name, rows in family.held.items() for row in rows}
    shapes = expected_tensors(family, config)
    found: dict[str, Held] = {}
    for place in placed_tensors(family, config):
        template = holder.get(place.row.name, place.row.name)
        name = template.format(i=place.layer)
        if name in found:
            continue
        rows = family.held.get(template, (place.row.name,))
        experts = range(size["experts"]) if place.row.per_expert else (None,)
        parts = tuple(tuple(r.format(i=place.layer, e=e) for r in rows) for e in experts)
        lengths = tuple(shapes[part][0] for part in parts[0])
        found[name] = Held(name, parts, lengths, stacked=place.row.per_expert)
    return tuple(found.values())


def on_disk(
    state: Mapping[str, torch.Tensor], family: Family, config: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """A model's state under the names on disk; views where a parameter holds several tensors."""
    return {
        name: tensor
        for held in held_parameters(family, config)
        for name, tensor in held.to_disk(state[held.name])
    }


def in_memory(
    tensors: Mapping[str, torch.Tensor], family: Family, config: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Tensors from disk, of a whole model or some of its layers, under the names in memory."""
    return {
        held.name: held.from_disk(tensors.__getitem__)
        for held in held_parameters(family, config)
        if held.parts[0][0] in tensors
    }
