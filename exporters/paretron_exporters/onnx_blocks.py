"""Matrices in 4 or 8 bits as ONNX Runtime's MatMulNBits keeps them, held to what they stand for.

A row is cut into blocks. A block's scale is its weight of largest magnitude over -2^(bits-1), so
that this weight has the code 0; a code stands for (code - 2^(bits-1)) * scale. Codes of 4 bits lie
two in a byte, the first one low. A weight as large with the other sign is clipped by a whole step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from paretron.artifacts.reader import Checkpoint
from paretron.evaluate.parity import Check, check_weights
from paretron_exporters.onnx_file import Graph
from paretron_exporters.onnx_precision import BLOCK, Precision
from paretron_exporters.onnx_weights import Match, source_rows

Shapes = dict[str, tuple[int, ...]]


def stored_shapes(matches: Mapping[str, Match], *, bits: int | None) -> Shapes:
    """Name and shape of every weight in the graph: codes and scales in place of a matrix."""
    found: Shapes = {}
    for name, match in matches.items():
        if bits is None or not match.transposed:
            found[name] = match.shape
            continue
        columns, rows = match.shape
        blocks = -(-columns // BLOCK)
        found[_codes(name, bits)] = (rows, blocks, BLOCK * bits // 8)
        found[_scales(name)] = (rows, blocks)
    return found


def restored(graph: Graph, name: str, match: Match, *, bits: int) -> torch.Tensor:
    """The matrix that the codes stand for, (out, in) in float32."""
    codes, scales = _read(graph, name, bits)
    return ((codes - 2 ** (bits - 1)) * scales[..., None]).flatten(1)[:, : match.shape[0]]


def check_blocks(
    checkpoint: Checkpoint, graph: Graph, matches: Mapping[str, Match], precision: Precision
) -> tuple[Check, Check]:
    """L1: every scale is its block's, every code the nearest to its weight.

    Both are measured relatively: scales to those that they should be, weights in steps. A tensor
    that is off by far less than a step shows in its scales.
    """
    assert precision.bits is not None
    matrices = {n: m for n, m in matches.items() if m.transposed}
    eps = torch.finfo(getattr(torch, precision.dtype)).eps
    reach = 2 ** (precision.bits - 1)
    return (
        check_weights(
            _scale_pairs(checkpoint, graph, matrices, precision),
            bound=2 * eps,
            about="scales of blocks, relative",
        ),
        check_weights(
            _code_pairs(checkpoint, graph, matrices, precision),
            bound=0.5 + 2 * reach * eps,
            about="quantised weights, in steps",
        ),
    )


def _scale_pairs(
    checkpoint: Checkpoint, graph: Graph, matrices: Mapping[str, Match], precision: Precision
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    bits = precision.bits or 0
    for graph_name, match in matrices.items():
        scales = graph.initialisers[_scales(graph_name)].read().float()
        for name, weight, rows in _sources(checkpoint, match, precision):
            blocks, found = _blocks(weight), scales[rows]
            high, low = blocks.amax(-1), blocks.amin(-1)
            largest = torch.where(high > -low, high, low)
            # Either sign is right where both ends are as far from zero.
            largest = torch.where(high == -low, -high * found.sign(), largest)
            expected = largest / -(2 ** (bits - 1))
            nothing = expected == 0
            ratio = found / expected.masked_fill(nothing, 1)
            yield name, torch.where(nothing, 0.0, 1.0), ratio


def _code_pairs(
    checkpoint: Checkpoint, graph: Graph, matrices: Mapping[str, Match], precision: Precision
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    bits = precision.bits or 0
    reach = 2 ** (bits - 1)
    for graph_name, match in matrices.items():
        codes, scales = _read(graph, graph_name, bits)
        for name, weight, rows in _sources(checkpoint, match, precision):
            steps = (_blocks(weight) / scales[rows][..., None]).nan_to_num(0.0)
            clipped = steps.clamp(-reach, reach - 1)
            empty = scales[rows][..., None] == 0
            found = (codes[rows] - reach).masked_fill(empty, 0)
            # What lies behind the end of a row stands for nothing.
            width = weight.shape[1]
            yield name, clipped.flatten(1)[:, :width], found.flatten(1)[:, :width]


def _sources(
    checkpoint: Checkpoint, match: Match, precision: Precision
) -> Iterator[tuple[str, torch.Tensor, slice]]:
    """(name, the weight as the quantiser saw it, its rows in the graph's matrix)."""
    start = 0
    for name in match.sources:
        own = source_rows(checkpoint, name, match, dtype=precision.dtype).float()
        yield name, own, slice(start, start + len(own))
        start += len(own)


def _blocks(weight: torch.Tensor) -> torch.Tensor:
    """(out, in) -> (out, blocks, BLOCK), filled up with zeros."""
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % BLOCK))
    return padded.unflatten(1, (-1, BLOCK))


def _read(graph: Graph, name: str, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (out, blocks, BLOCK) and scales (out, blocks), both in float32."""
    packed = graph.initialisers[_codes(name, bits)].read()
    if bits == 4:
        packed = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    return packed.float(), graph.initialisers[_scales(name)].read().float()


def _codes(name: str, bits: int) -> str:
    return f"{name}_Q{bits}"


def _scales(name: str) -> str:
    return f"{name}_scales"
