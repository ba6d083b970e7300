"""Residual merging: what the kept heads take over from pruned ones (paper 1, section 2.3).

With L heads in order of importance pruned to K, for i in [K - (L - K), K], 1-based:
head_i <- head_i + (head_i - head_{2K - i + 1}). The lower end would pair with head L + 1, which
does not exist, so i starts at 2K - L + 1, and at 1 where that is below. The least important kept
head takes from the most important pruned one.

A head is what makes `Attn(X W_Q, X W_K, X W_V)`, so the output projection's columns are not part
of it. With grouped queries only the query heads are merged, each inside its KV group, whose keys
and values they share: the rows of q_proj, weight and bias. A KV group pruned whole takes its query
heads with it. Where every head has its own keys and values (one query head a group), the heads of
the layer are merged whole: the rows of q_proj, k_proj and v_proj. Norms on query and key have
head_dim entries and no heads, or one entry for each channel of each head: those are only cut.
"""

from __future__ import annotations

import torch

from paretron.families import Sizes, Tensor
from paretron.surgery.selection import HeadRanks
from paretron.surgery.slicing import Kept, slice_tensor


def partners(ranking: torch.Tensor, *, kept: int) -> torch.Tensor:
    """For every head the one whose residual it takes, itself where there is none.

    `ranking` is [..., L] from the most to the least important head; so is the result, but indexed
    by the head's number. `head + (head - itself)` is the head.
    """
    total = ranking.shape[-1]
    out = torch.arange(total).expand_as(ranking).clone()
    for i in range(max(1, 2 * kept - total + 1), kept + 1):
        giver = ranking[..., 2 * kept - i + 1 - 1, None]
        out.scatter_(-1, ranking[..., i - 1, None], giver)
    return out


def givers(row: Tensor, *, sizes: Sizes, kept: Kept, ranks: HeadRanks) -> Kept | None:
    """What is kept with the head that gives in place of each that takes; None where none does."""
    axis = "q_per_kv" if sizes["q_per_kv"] > 1 else "kv_heads"
    ranking = ranks.groups if axis == "q_per_kv" else ranks.heads
    # A norm over all heads (OLMo 2) scales what its projection gives: it is cut, not merged.
    projection = not row.name.endswith("norm.weight")
    carried = projection and any(axis in segment for segment in row.dims[0])
    if not carried or axis not in kept or ranking is None:
        return None
    table = partners(ranking, kept=kept[axis].shape[-1])
    return {**kept, axis: table.gather(-1, kept[axis])}


def merged_slice(
    tensor: torch.Tensor, row: Tensor, *, sizes: Sizes, kept: Kept, ranks: HeadRanks
) -> torch.Tensor:
    """The kept entries of a layer's tensor, with residuals of pruned heads in the kept ones.

    Tensors whose rows carry no pruned heads are only sliced. Computed in fp32, rounded back.
    """
    own = slice_tensor(tensor, row, sizes=sizes, kept=kept)
    giving = givers(row, sizes=sizes, kept=kept, ranks=ranks)
    if giving is None:
        return own
    other = slice_tensor(tensor, row, sizes=sizes, kept=giving)
    return torch.sub(own.float(), other.float()).add_(own.float()).to(tensor.dtype)
