"""What is fitted to pairs of streams: a norm's scale, and a map for the matrices that read a norm.

Pairs are positions of a teacher's stream [n, D] and of its student's [n, K], a few at a time.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from paretron.compensate.moments import Moments
from paretron.compensate.trimmed import Coordinates

Pairs = Iterable[tuple[torch.Tensor, torch.Tensor]]


def norm_scale(pairs: Pairs, coordinates: Coordinates, *, norm: str) -> float:
    """The s that brings the student's normalised stream z closest to the teacher's, B x.

    Least squares of one number: the sum of <z, B x> over that of |z|^2, both of mean square 1.
    """
    product = square = 0.0
    for theirs, mine in pairs:
        wanted = coordinates.of(normalised(theirs, norm=norm)).double()
        z = normalised(mine, norm=norm).double()
        product += float((z * wanted).sum())
        square += float(z.square().sum())
    return product / square


def reader_map(
    pairs: Pairs,
    teacher_norm: nn.Module,
    norm: nn.Module,
    plain_DK: torch.Tensor,
    *,
    without: torch.Tensor | None,
    ridge: float,
) -> torch.Tensor:
    """M [D, K]: what the teacher's norm gives, of what the student's gives, by ridge.

    `plain_DK` is the map that trimming alone amounts to, towards which M is shrunk; `without` a
    bias of the teacher's norm that its readers add on their own.
    """
    moments: Moments | None = None
    for theirs, mine in pairs:
        given, found = teacher_norm(theirs), norm(mine)
        if without is not None:
            given = given - without
        if moments is None:
            outputs, inputs = plain_DK.shape
            moments = Moments.zeros(inputs, outputs, device=found.device)
            plain_DK = plain_DK.to(found)
        moments.add(found, given - found @ plain_DK.T)
    if moments is None:
        raise ValueError("no sample to fit to")
    return plain_DK + moments.solve(ridge=ridge).float()


def normalised(x_ND: torch.Tensor, *, norm: str) -> torch.Tensor:
    """The stream as a norm leaves it before weight and bias; nothing is added to the variance."""
    x = x_ND - x_ND.mean(-1, keepdim=True) if norm == "layernorm" else x_ND
    square = x.square().mean(-1, keepdim=True)
    return x * square.clamp(min=torch.finfo(torch.float32).tiny).rsqrt()
