"""Is a TensorRT-LLM checkpoint its source? The ranks' files are put together again and compared.

Where a source tensor lies is worked out here from the ranks' shapes, not taken from the plan that
the writer followed. The format can only be run by an engine built for a GPU, so L0 and L1 are all
that can be asked here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from math import inf, prod
from pathlib import Path

import torch

from paretron.artifacts.headers import TensorEntry, read_header
from paretron.artifacts.reader import Checkpoint
from paretron.artifacts.tensors import map_entry
from paretron.errors import Code, ParetronError, Problem
from paretron.evaluate.parity import (
    Check,
    ParityReport,
    check_names,
    check_weights,
    largest_difference,
    require,
    weights_check,
)
from paretron.families import Placed, placed_tensors, sizes
from paretron.families.cuts import cut_of
from paretron_exporters.trtllm_layout import (
    EMBEDDING,
    HEAD,
    WEIGHT_SCALE,
    Layout,
    target_name,
)
from paretron_exporters.trtllm_ranks import converted, planned, rows_of, stage_targets
from paretron_exporters.trtllm_scales import Scales

_ROWS_BYTES = 1 << 25  # compared at a time
# Half a gap between neighbours of float8_e4m3fn: 2^-4 of a number, 2^-10 near zero; and what the
# division by the scale rounds.
_RELATIVE, _NEAR_ZERO = 2.0**-4 + 2.0**-20, 2.0**-10
_ROUNDED = "FP8 weights, in halves of the gap between numbers"
Files = tuple[tuple[Mapping[str, TensorEntry], ...], ...]  # the tensors of [stage][rank]
_Pairs = Iterator[tuple[str, torch.Tensor, torch.Tensor]]


class Proof:
    """What the ranks' files held of the source, seen tensor by tensor while they were written.

    Then both are in the page cache, so that proving every value reads nothing again from the disk.
    """

    def __init__(self, source: Checkpoint, layout: Layout, *, dtype: str) -> None:
        self.source, self.layout, self.dtype = source, layout, dtype
        self.size = sizes(source.family, source.config)
        self._parts: dict[tuple[int, str], list[Placed]] = {}
        for place in placed_tensors(source.family, source.config):
            stage, first_layer = self._stage_of(place)
            name = target_name(place, source.family, first_layer=first_layer)
            self._parts.setdefault((stage, name), []).append(place)
        if source.config.get("tie_word_embeddings"):
            last = layout.pipeline_parallel - 1
            self._parts[last, HEAD] = [next(placed_tensors(source.family, source.config))]
        self._equal: dict[str, float] = {}  # largest differences of what is not quantised
        self._rounded: dict[str, float] = {}
        self._starts: dict[tuple[int, int, str], int] = {}

    def see(self, stage: int, name: str, files: Sequence[Mapping[str, TensorEntry]]) -> None:
        """One tensor of the format, just written for all ranks of a stage, with its scales."""
        for place in self._parts[stage, name]:
            into = self._equal if _stored_scale(files[0], name) is None else self._rounded
            for expected, found in _compared(self, place, files, name):
                key = _key(place, name)
                into[key] = max(into.get(key, 0.0), largest_difference(expected, found))
            _forget(self.source.entries[place.name])
        for rank, entries in enumerate(files):
            self._starts |= {(stage, rank, n): e.start for n, e in entries.items()}

    def checks(self, files: Files, *, fp8: bool) -> tuple[Check, ...]:
        """L1 of the finished files: every tensor of the source was seen, where headers say."""
        for (stage, name), places in self._parts.items():
            into = self._rounded if fp8 and _stored_scale(files[stage][0], name) else self._equal
            for rank, entries in enumerate(files[stage]):
                if self._starts.get((stage, rank, name)) != entries[name].start:
                    into |= dict.fromkeys((_key(place, name) for place in places), inf)
        equal = weights_check(self._equal, bound=0.0)
        return (equal, weights_check(self._rounded, bound=1.0, about=_ROUNDED)) if fp8 else (equal,)

    def _stage_of(self, place: Placed) -> tuple[int, int]:
        """The stage that holds a tensor, and that stage's first layer."""
        stages = self.layout.stage_layers(self.size["layers"])
        if place.layer is None:
            stage = 0 if place.name == EMBEDDING else len(stages) - 1
        else:
            stage = next(s for s, layers in enumerate(stages) if place.layer in layers)
        return stage, stages[stage].start


def prove(folder: Path, proof: Proof, *, scales: Scales | None) -> ParityReport:
    """Levels L0 and L1 of every rank's file; raises at the first that fails."""
    fp8 = scales is not None
    form = "FP8" if fp8 else proof.dtype
    what = (f"source {proof.source.dtype}", f"TensorRT-LLM checkpoint {form}")
    files = _headers(folder, proof.layout)
    checks: tuple[Check, ...] = _check_headers(proof, files, fp8=fp8)
    require(ParityReport(*what, checks))
    checks += proof.checks(files, fp8=fp8)
    if scales is not None:
        stored = _scales(proof, files, scales)
        checks += (check_weights(stored, bound=0.0, about="scales on all ranks"),)
    report = ParityReport(*what, checks)
    require(report)
    return report


def _headers(folder: Path, layout: Layout) -> Files:
    """The tensors of every file; GATE_RELOAD for one that is not there or does not hold."""
    stages, ranks = range(layout.pipeline_parallel), range(layout.tensor_parallel)
    try:
        return tuple(
            tuple(read_header(folder / layout.file(stage, rank)) for rank in ranks)
            for stage in stages
        )
    except (ParetronError, FileNotFoundError) as error:
        cause = error.problems[0].cause if isinstance(error, ParetronError) else str(error)
        raise ParetronError(Problem(Code.GATE_RELOAD, cause, where=str(folder))) from error


def _check_headers(proof: Proof, files: Files, *, fp8: bool) -> tuple[Check, Check]:
    """L0: the tensors of every rank, in their shapes, and in their dtypes."""
    expected: dict[str, tuple[str, tuple[int, ...]]] = {}
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for stage, of_stage in enumerate(files):
        for rank, entries in enumerate(of_stage):
            file = proof.layout.file(stage, rank)
            for of_ranks in stage_targets(proof.source, proof.layout, stage):
                plan = planned(of_ranks[rank], dtype=proof.dtype, fp8=fp8)
                expected |= {f"{file}: {name}": what for name, what in plan.items()}
            found |= {f"{file}: {name}": (e.dtype, e.shape) for name, e in entries.items()}
    names = check_names(
        {n: shape for n, (_, shape) in expected.items()},
        {n: shape for n, (_, shape) in found.items()},
    )
    other = [n for n, (dtype, _) in expected.items() if found.get(n, ("",))[0] != dtype]
    worst = other[0] if other else ""
    dtypes = Check("L0", "dtypes", not other, {"other_dtype": len(other)}, {}, worst=worst)
    return names, dtypes


def _compared(
    proof: Proof, place: Placed, files: Sequence[Mapping[str, TensorEntry]], name: str
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Parts of a source tensor, and what lies in the ranks' files in their place.

    Of FP8 both are divided by the largest error that rounding makes, so that 1 is the bound.
    """
    source, of_norm = proof.source, place.row.is_norm
    added = source.family.norm_offset if of_norm else 0.0
    entry = source.entries[place.name]
    seen = 0
    for rank, rows, columns, behind in _located(proof, place, files, name):
        seen += len(rows) * prod(files[rank][name].shape[1:])
        stored, scale = files[rank][name], _stored_scale(files[rank], name)
        at_once = max(1, _ROWS_BYTES // max(1, entry.nbytes // entry.shape[0]))
        for first in range(rows.start, rows.stop, at_once):
            some = range(first, min(first + at_once, rows.stop))
            found = map_entry(rows_of(stored, some))
            wanted = range(behind + some.start - rows.start, behind + some.stop - rows.start)
            held = range(min(wanted.start, entry.shape[0]), min(wanted.stop, entry.shape[0]))
            values = map_entry(rows_of(entry, held))
            if columns is not None:
                values = values[:, columns.start : columns.stop]
            if len(held) < len(wanted):  # rows that fill the vocabulary up are zeros
                missing = values.new_zeros(len(wanted) - len(held), *values.shape[1:])
                values = torch.cat((values, missing))
            if scale is None:
                where = source.where(place.name)
                yield converted(values, proof.dtype, added=added, where=where), found
            else:
                expected = values.float()
                step = (expected.abs() * _RELATIVE).clamp(min=scale * _NEAR_ZERO)
                yield expected / step, found.float() * scale / step
    if seen < prod(entry.shape):
        yield torch.zeros(()), torch.tensor(inf)


def _located(
    proof: Proof, place: Placed, files: Sequence[Mapping[str, TensorEntry]], name: str
) -> Iterator[tuple[int, range, range | None, int]]:
    """Where a source tensor lies: the rank, its rows there, and which columns and row they are.

    Every rank has its own part; one that several have is there once for each.
    """
    size, degree, cut = proof.size, proof.layout.tensor_parallel, cut_of(place.row)
    columns = rows = 0
    for rank, entries in enumerate(files):
        shape = entries[name].shape
        if ".attention.qkv." in name:
            width, groups = size["head_dim"], size["kv_heads"]
            keys = max(1, groups // degree) * width
            queries = shape[0] - 2 * keys
            start = {"q": 0, "k": queries, "v": queries + keys}[_letter(place)]
            count = queries if start == 0 else keys
            behind = rank * queries if start == 0 else rank * groups // degree * width
            yield rank, range(start, start + count), None, behind
        elif cut == "rows":
            yield rank, range(shape[0]), None, rows
            rows += shape[0]
        elif cut == "columns":
            yield rank, range(shape[0]), range(columns, columns + shape[1]), 0
            columns += shape[1]
        else:
            yield rank, range(shape[0]), None, 0


def _key(place: Placed, name: str) -> str:
    """A tensor as an error names it: as the source calls it, and where it lies now."""
    return f"{place.name}, stored in {name}"


def _letter(place: Placed) -> str:
    """Which of query, key and value a tensor makes: q, k or v."""
    return place.row.name.rpartition("_proj.")[0][-1]


def _stored_scale(entries: Mapping[str, TensorEntry], name: str) -> float | None:
    scale = entries.get(name.removesuffix("weight") + WEIGHT_SCALE)
    return None if scale is None else float(map_entry(scale))


def _scales(proof: Proof, files: Files, scales: Scales) -> _Pairs:
    """The scales in every rank's file against those that weights and text gave."""
    for stage, of_stage in enumerate(files):
        for of_ranks in stage_targets(proof.source, proof.layout, stage):
            group = of_ranks[0].scaled
            for rank, target in enumerate(of_ranks if group else ()):
                given = (scales.weights[group], scales.inputs[group])
                for name, value in zip(target.scale_names, given, strict=True):
                    where = f"{proof.layout.file(stage, rank)}: {name}"
                    yield where, torch.tensor([value]), map_entry(of_stage[rank][name])


def _forget(entry: TensorEntry) -> None:
    """Let the page cache forget a tensor: a cache full of what nobody reads again slows others."""
    with entry.file.open("rb") as f:
        os.posix_fadvise(f.fileno(), entry.start, entry.nbytes, os.POSIX_FADV_DONTNEED)
