"""What writes the residual stream and what reads it, through which norm: derived from a table.

A matrix whose rows are `hidden` writes, one whose columns are reads. Of a layer's two norms, which
tables list in the order in which they run, the first is read by attention (the matrices with heads
in their rows) and the second by the MLP, experts and router included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from paretron.families import Family, Tensor

HIDDEN = (("hidden",),)

Role = Literal[
    "embedding", "head", "norm", "norm_bias", "reader", "reader_bias", "writer", "writer_bias", ""
]


@dataclass(frozen=True)
class Half:
    """Half a layer: a norm, the matrices that read it, the matrices that write what comes of it.

    `absorbs`: the norm has a bias, and every reader has one that can take it over.
    """

    norm: Tensor
    readers: tuple[Tensor, ...]
    writers: tuple[Tensor, ...]
    absorbs: bool

    @property
    def routed(self) -> bool:
        """Whether experts write."""
        return any(t.per_expert for t in self.writers)


def rotation_limit(family: Family) -> str:
    """Why a family's residual stream cannot be rotated exactly; "" where it can.

    RMSNorm commutes with an orthogonal map once its weight is folded into what reads it; so does
    LayerNorm with one that keeps the direction of the mean. A norm over what a layer writes has no
    reader to be folded into.
    """
    if family.post_norms:
        return "its norms over what attention and MLP write do not commute with a rotation"
    return ""


def refit_limit(family: Family) -> str:
    """Why a family's matrices cannot be refitted; "" where they can."""
    if family.post_norms:
        return "what its layers write passes a norm, so it is not linear in the matrices"
    return ""


def role_of(family: Family, row: Tensor) -> Role:
    """What a row of the table is to the residual stream; "" for what never touches it."""
    if len(row.dims) == 2:
        if row.dims[0] == HIDDEN:
            return "writer"
        if row.dims[1] != HIDDEN:
            return ""
        if row.per_layer:
            return "reader"
        return "embedding" if row == _embedding(family) else "head"
    if row.is_norm:
        return "norm"
    if not row.name.endswith(".bias"):
        return ""
    weight = next((t for t in family.tensors if t.name == _weight_of(row)), None)
    of_what = role_of(family, weight) if weight else ""
    if of_what == "norm":
        return "norm_bias"
    if of_what == "writer":
        return "writer_bias"
    return "reader_bias" if of_what == "reader" else ""


def halves(family: Family, config: Mapping[str, Any], layer: int) -> tuple[Half, Half]:
    """Attention's half of a layer and the MLP's; ValueError for a family with norms elsewhere."""
    rows = family.rows(config, layer)
    norms = [t for t in rows if role_of(family, t) == "norm"]
    if family.post_norms or len(norms) != 2:
        raise ValueError(f"{family.model_type} does not norm what attention and MLP read")
    return _half(family, rows, norms[0], attention=True), _half(
        family, rows, norms[1], attention=False
    )


def unabsorbed(family: Family, config: Mapping[str, Any]) -> tuple[str, ...]:
    """The norms with a bias that no bias of a reader can take over, as a table names them."""
    names = {t.name for t in (*family.rows(config, 0), *family.tensors)}
    norms = [half.norm for half in halves(family, config, 0) if not half.absorbs]
    return tuple(
        norm.name.removesuffix(".weight")
        for norm in (*norms, final_norm(family))
        if norm.name.removesuffix("weight") + "bias" in names
    )


def final_norm(family: Family) -> Tensor:
    """The norm that the head reads."""
    return next(t for t in family.tensors if t.is_norm and not t.per_layer)


def half_of(found: tuple[Half, Half], row: Tensor) -> int:
    """The half whose norm a reader or its bias reads, or whose writer a row belongs to."""
    weight = _weight_of(row)
    return next(
        k
        for k, half in enumerate(found)
        if any(t.name == weight for t in (*half.readers, *half.writers, half.norm))
    )


def _half(family: Family, rows: tuple[Tensor, ...], norm: Tensor, *, attention: bool) -> Half:
    def mine(role: Role) -> tuple[Tensor, ...]:
        found = (t for t in rows if role_of(family, t) == role)
        return tuple(t for t in found if _is_attention(t) == attention)

    readers = mine("reader")
    names = {t.name for t in rows}
    biased = norm.name.removesuffix("weight") + "bias" in names
    absorbs = biased and all(t.name.removesuffix("weight") + "bias" in names for t in readers)
    return Half(norm, readers, mine("writer"), absorbs)


def _is_attention(row: Tensor) -> bool:
    return any("kv_heads" in segment for dim in row.dims for segment in dim)


def _embedding(family: Family) -> Tensor:
    """The first of the tensors outside of the layers: a lookup, whose rows are written."""
    return next(t for t in family.tensors if not t.per_layer)


def _weight_of(row: Tensor) -> str:
    return row.name.removesuffix("bias") + "weight" if row.name.endswith("bias") else row.name
