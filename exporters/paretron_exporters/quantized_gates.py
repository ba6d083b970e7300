"""Is a quantised checkpoint its source, rounded and nothing else? Asked of the files as written.

L0: every tensor in its dtype and shape. L1: each matrix, decoded, lies within half a gap of the
form's numbers of the source, its scales are those that the source gives, its error as a whole is
within the form's bound, and what is not quantised is equal. L2 to L4: the decoded model computes
what the source does, within the divergence that the form may cause.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from paretron.artifacts.headers import TensorEntry
from paretron.artifacts.reader import Checkpoint
from paretron.artifacts.shards import entries_of, weight_files
from paretron.artifacts.tensors import map_entry
from paretron.errors import Code, ParetronError, Problem
from paretron.evaluate.parity import Check
from paretron_exporters.quantized_codes import (
    Stored,
    decode,
    expected_blocks,
    expected_scales,
    rounding,
)
from paretron_exporters.quantized_forms import (
    SCALE,
    SCALE_2,
    SMOOTH,
    Form,
    Layout,
    folded_norms,
    quantised,
    sharing_input,
)

# Arithmetic in float32 against float32, and through scales that are stored in 16 bits: smoothing
# is undone by a rounded factor, and two of them where a norm holds it.
_EXACT, _ROUNDED = 1e-5, 2.0**-7
_PARTS = (SCALE, SCALE_2, SMOOTH)


@dataclass(frozen=True)
class Written:
    """A quantised checkpoint as it lies on disk, with the source that it was made from.

    `given` are the tensors that no source tells: scales of activations, as they were calibrated.
    """

    source: Checkpoint
    form: Form
    entries: Mapping[str, TensorEntry]
    given: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        source: Checkpoint,
        form: Form,
        given: Mapping[str, torch.Tensor] | None = None,
    ) -> Written:
        """Read the headers; GATE_RELOAD when they, or the index, do not hold together."""
        try:
            found = entries_of(weight_files(folder))
        except ParetronError as error:
            raise ParetronError(
                *(Problem(Code.GATE_RELOAD, p.cause, where=p.where) for p in error.problems)
            ) from error
        return cls(source, form, found, given or {})

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(e.nbytes for e in self.entries.values())

    def stored(self, name: str) -> Stored:
        """What is stored of a quantised matrix, by the last parts of the names."""
        module = name.removesuffix("weight")
        names = {last: module + last for last in ("weight", *_PARTS)}
        return {last: self.read(n) for last, n in names.items() if n in self.entries}

    def read(self, name: str) -> torch.Tensor:
        """One tensor as it lies there, memory-mapped."""
        return map_entry(self.entries[name])

    def plain(self, name: str) -> torch.Tensor:
        """A tensor of the source's table as this checkpoint has it, decoded to float32."""
        if name in quantised(self.source.family, self.source.config):
            return decode(self.stored(name), self.form.codes)
        return self.read(name).float()


@dataclass(frozen=True)
class MatrixError:
    """How far one decoded matrix is from its source.

    `relative` is the Frobenius norm of the difference over that of the source. `beyond` is the
    largest difference over what rounding explains, `scales` the largest relative difference of a
    scale from the one that the source gives, over what is allowed: right up to 1.
    """

    relative: float
    beyond: float
    scales: float

    def severity(self, form: Form) -> float:
        """How bad it is: right up to 1."""
        worst = max(self.relative / form.largest_error, self.beyond, self.scales)
        return math.inf if math.isnan(worst) else worst


def check_layout(layout: Layout, found: Mapping[str, TensorEntry]) -> Check:
    """L0: every tensor is there in its dtype and shape, and nothing else is."""
    missing = [n for n in layout if n not in found]
    others = [n for n in found if n not in layout]
    wrong = [n for n, w in layout.items() if n in found and (found[n].dtype, found[n].shape) != w]
    return Check(
        "L0",
        "names, dtypes and shapes",
        bool(layout) and not (missing or others or wrong),
        {
            "tensors": len(layout),
            "missing": len(missing),
            "unexpected": len(others),
            "other_form": len(wrong),
        },
        {},
        worst=next(iter((*missing, *wrong, *others)), ""),
    )


def check_matrices(written: Written) -> tuple[Check, dict[str, MatrixError]]:
    """L1, and the error of each matrix; the worst tensor is named."""
    form, errors = written.form, dict(matrix_errors(written))
    severity = {name: error.severity(form) for name, error in errors.items()}
    severity |= dict.fromkeys(_changed(written), math.inf)
    worst = max(severity, key=lambda n: severity[n])
    relative = [e.relative for e in errors.values()]
    measured = {
        "matrices": len(errors),
        "wrong": sum(not s <= 1 for s in severity.values()),
        "worst_error": max(relative),
        "mean_error": sum(relative) / len(relative),
        "beyond_rounding": max(e.beyond for e in errors.values()),
        "beyond_scales": max(e.scales for e in errors.values()),
    }
    bounds = {"worst_error": form.largest_error, "beyond_rounding": 1.0, "beyond_scales": 1.0}
    passed = all(s <= 1 for s in severity.values())
    return Check("L1", "decoded weights", passed, measured, bounds, worst=worst), errors


def matrix_errors(written: Written) -> Iterator[tuple[str, MatrixError]]:
    """Every quantised matrix against its source, one at a time."""
    source, form = written.source, written.form
    places = quantised(source.family, source.config)
    shared = sharing_input(places)
    norms = folded_norms(source.family, source.config) if form.name == "int4_awq" else {}
    for name in places:
        stored = written.stored(name)
        weight = source.read(name).float()
        factors = _folded(written, norms[name]) if name in norms else torch.ones(())
        difference = (decode(stored, form.codes) * factors - weight).abs_()
        slack = _ROUNDED if form.smoothed else _EXACT
        allowed = rounding(stored, form.codes).mul_(factors.abs()) + slack * weight.abs()
        beyond = (difference / allowed.clamp_(min=torch.finfo().tiny)).amax()
        smooth = stored.get(SMOOTH, torch.ones(())).float() * factors
        others = [source.read(n).float() for n in shared[name] if n != name]
        yield (
            name,
            MatrixError(
                relative=float(difference.norm() / weight.norm().clamp(min=1e-30)),
                beyond=float(beyond),
                scales=_scales(form, stored, weight / smooth, others),
            ),
        )


def _scales(
    form: Form, stored: Stored, smoothed: torch.Tensor, others: list[torch.Tensor]
) -> float:
    """The largest difference of a scale from what it should be, over what is allowed.

    Of matrices that read the same, the one scale of each may be that of the largest of them.
    """
    key = SCALE_2 if form.codes == "nvfp4" else SCALE
    scales = stored[key].float()
    expected = expected_scales(smoothed, form.codes, scales=scales)
    allowed = _ROUNDED if form.smoothed else _EXACT
    found = _relative(scales, torch.where(expected > 0, expected, scales))
    if not scales.dim():
        joint = max([expected, *(expected_scales(o, form.codes, scales=scales) for o in others)])
        found = min(found, _relative(scales, joint))
    if form.codes == "nvfp4":
        blocks, right = stored[SCALE], expected_blocks(smoothed, scale_2=scales)
        if not torch.equal(blocks.view(torch.uint8), right.view(torch.uint8)):
            return math.inf
    return found / allowed


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found - expected).abs() / expected.abs().clamp(min=1e-30)).amax())


def _changed(written: Written) -> Iterator[str]:
    """The tensors that should be equal to the source's and are not, and scales that are no numbers.

    A norm that holds a smoothing is judged by the matrices that read it, its bias by the norm.
    """
    source = written.source
    places = quantised(source.family, source.config)
    folded = folded_norms(source.family, source.config) if written.form.name == "int4_awq" else {}
    norms = set(folded.values())
    for name in written.entries:
        if name in source.entries and name not in places:
            if name in norms:
                continue
            expected, found = source.read(name), written.read(name)
            weight = name.removesuffix("bias") + "weight"
            if weight in norms:
                error = (found.float() - expected.float() * _folded(written, weight)).abs()
                same = bool((error <= _ROUNDED * found.float().abs() + 1e-30).all())
            else:
                same = torch.equal(expected, found)
            if not same:
                yield name
        elif name.endswith("_scale"):
            scale = written.read(name).float()
            right = torch.isfinite(scale).all() and (scale > 0).all()
            if not right or not torch.equal(scale, written.given.get(name, scale)):
                yield name


def _folded(written: Written, norm: str) -> torch.Tensor:
    """What a norm multiplies by here over what it does in the source, [in]; 1 where that is 0."""
    offset = written.source.family.norm_offset
    before = written.source.read(norm).float() + offset
    after = written.read(norm).float() + offset
    return torch.where(before != 0, after / before, torch.ones(()))


def summary(errors: Mapping[str, MatrixError]) -> dict[str, Any]:
    """The errors for quantization.json: the worst, the mean, and each."""
    relative = {name: float(f"{e.relative:.4g}") for name, e in errors.items()}
    worst = max(relative, key=lambda n: relative[n])
    return {
        "worst": {"tensor": worst, "relative_error": relative[worst]},
        "mean_relative_error": float(f"{sum(relative.values()) / len(relative):.4g}"),
        "relative_error": relative,
    }
