"""Residual head merging against the paper's formula, written out 1-based."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from makers import PicoMaker
from paretron.families import FAMILIES
from paretron.surgery.heads import merged_slice, partners
from paretron.surgery.selection import HeadRanks
from paretron.surgery.slicing import slice_tensor
from picoscores import prune_to

HEAD_DIM = 4


def _by_the_paper(ranked: list[torch.Tensor], kept: int) -> list[torch.Tensor]:
    """heads 1..L in order of importance -> the new heads 1..K, by the formula of section 2.3."""
    total = len(ranked)
    head = dict(enumerate(ranked, start=1))
    new = {i: head[i] for i in range(1, kept + 1)}
    for i in range(kept - (total - kept), kept + 1):
        partner = 2 * kept - i + 1
        if i >= 1 and partner <= total:
            new[i] = head[i] + (head[i] - head[partner])
    return [new[i] for i in range(1, kept + 1)]


@pytest.mark.parametrize(
    ("total", "kept"), [(2, 1), (4, 1), (4, 2), (4, 3), (4, 4), (5, 3), (8, 5), (8, 2), (1, 1)]
)
def test_partners_follow_the_formula(total: int, kept: int) -> None:
    ranking = torch.randperm(total, generator=torch.Generator().manual_seed(total))
    heads = torch.randn(total, HEAD_DIM, dtype=torch.float64)
    table = partners(ranking, kept=kept)
    mine = [heads[r] + (heads[r] - heads[table[r]]) for r in ranking[:kept]]
    expected = _by_the_paper([heads[r] for r in ranking], kept)
    torch.testing.assert_close(torch.stack(mine), torch.stack(expected), rtol=0, atol=1e-12)


def test_by_hand() -> None:
    """L = 4, K = 3: i in [2, 3], but head 5 does not exist, so only head 3 takes from head 4."""
    assert partners(torch.tensor([2, 0, 3, 1]), kept=3).tolist() == [0, 1, 2, 1]
    # L = 4, K = 1: only head 1 is left, and takes from head 2.
    assert partners(torch.tensor([2, 0, 3, 1]), kept=1).tolist() == [0, 1, 0, 3]
    # L = 4, K = 2: head 2 takes from 3, head 1 from 4.
    assert partners(torch.tensor([2, 0, 3, 1]), kept=2).tolist() == [3, 1, 1, 3]


@pytest.mark.parametrize("suffix", ["q_proj.weight", "q_proj.bias"])
def test_query_rows_are_merged_inside_their_group(suffix: str) -> None:
    row = FAMILIES["qwen2"].row(suffix)
    sizes = {"hidden": 6, "kv_heads": 3, "q_per_kv": 4, "head_dim": HEAD_DIM}
    tensor = torch.randn(row.shape(sizes))
    ranking = torch.stack(
        [torch.randperm(4, generator=torch.Generator().manual_seed(g)) for g in (1, 2)]
    )
    kept = {
        "kv_heads": torch.tensor([0, 2]),
        "q_per_kv": ranking[:, :2].sort(dim=-1).values,
        "hidden": torch.tensor([0, 1, 5]),
    }
    found = merged_slice(tensor, row, sizes=sizes, kept=kept, ranks=HeadRanks(ranking))
    narrow = tensor if tensor.dim() == 1 else tensor[:, [0, 1, 5]]
    heads = narrow.unflatten(0, (3, 4, HEAD_DIM))
    expected = []
    for place, group in enumerate((0, 2)):
        order = ranking[place].tolist()
        new = _by_the_paper([heads[group, h] for h in order], 2)
        # Kept heads stand in their original order.
        expected += [new[order.index(h)] for h in sorted(order[:2])]
    torch.testing.assert_close(found, torch.cat(expected))


@pytest.mark.parametrize("suffix", ["k_proj.weight", "v_proj.bias", "o_proj.weight"])
def test_grouped_keys_values_and_output_are_only_sliced(suffix: str) -> None:
    row = FAMILIES["llama"].row(suffix)
    sizes = {"hidden": 6, "kv_heads": 2, "q_per_kv": 4, "head_dim": HEAD_DIM}
    tensor = torch.randn(row.shape(sizes))
    groups = torch.stack([torch.tensor([3, 1, 0, 2])] * 2)
    kept = {"q_per_kv": groups[:, :2].sort(dim=-1).values}
    found = merged_slice(tensor, row, sizes=sizes, kept=kept, ranks=HeadRanks(groups))
    if suffix == "o_proj.weight":
        expected = tensor.unflatten(1, (2, 4, HEAD_DIM))[:, :, [1, 3]].flatten(1)
    else:
        expected = tensor
    assert torch.equal(found, expected)


@pytest.mark.parametrize("suffix", ["q_proj.weight", "k_proj.weight", "v_proj.weight"])
def test_heads_with_keys_of_their_own_are_merged_whole(suffix: str) -> None:
    row = FAMILIES["llama"].row(suffix)
    sizes = {"hidden": 6, "kv_heads": 4, "q_per_kv": 1, "head_dim": HEAD_DIM}
    tensor = torch.randn(row.shape(sizes))
    order = [3, 1, 0, 2]
    ranks = HeadRanks(torch.zeros(3, 1, dtype=torch.int64), torch.tensor(order))
    kept = {"kv_heads": torch.tensor([0, 1, 3])}
    found = merged_slice(tensor, row, sizes=sizes, kept=kept, ranks=ranks)
    heads = tensor.unflatten(0, (4, HEAD_DIM))
    new = _by_the_paper([heads[h] for h in order], 3)
    torch.testing.assert_close(found, torch.cat([new[order.index(h)] for h in (0, 1, 3)]))


@pytest.mark.parametrize("q_per_kv", [1, 2])
def test_heads_in_a_fused_matrix_are_merged_as_in_matrices_of_their_own(q_per_kv: int) -> None:
    fused = FAMILIES["phi3"].row("qkv_proj.weight")
    rows = [FAMILIES["llama"].row(f"{p}_proj.weight") for p in "qkv"]
    sizes = {"hidden": 6, "kv_heads": 4, "q_per_kv": q_per_kv, "head_dim": HEAD_DIM}
    parts = [torch.randn(row.shape(sizes)) for row in rows]
    order = torch.tensor([3, 1, 0, 2])
    if q_per_kv == 1:
        ranks = HeadRanks(torch.zeros(3, 1, dtype=torch.int64), order)
        kept = {"kv_heads": torch.tensor([0, 1, 3])}
    else:
        groups = torch.tensor([[1, 0], [0, 1], [0, 1], [1, 0]])
        ranks, kept = HeadRanks(groups), {"q_per_kv": groups[:, :1]}
    found = merged_slice(torch.cat(parts), fused, sizes=sizes, kept=kept, ranks=ranks)
    alone = [
        merged_slice(part, row, sizes=sizes, kept=kept, ranks=ranks)
        for part, row in zip(parts, rows, strict=True)
    ]
    assert torch.equal(found, torch.cat(alone))
    assert not torch.equal(alone[0], slice_tensor(parts[0], rows[0], sizes=sizes, kept=kept))


def test_norms_over_all_heads_are_cut_but_not_merged(pico: PicoMaker, tmp_path: Path) -> None:
    model = pico("olmo2", num_hidden_layers=1)
    kept = prune_to(model, tmp_path / "out", merge_heads=True, q_per_kv=1).units[0]["q_per_kv"]
    name = "model.layers.0.self_attn.q_norm.weight"
    before = load_file(model / "model.safetensors")[name].view(2, 2, 32)
    after = load_file(tmp_path / "out" / "model.safetensors")[name].view(2, 1, 32)
    assert torch.equal(after[:, 0], before[torch.arange(2), kept[:, 0]])


def test_bf16_rounds_once() -> None:
    row = FAMILIES["llama"].row("q_proj.weight")
    sizes = {"hidden": 64, "kv_heads": 1, "q_per_kv": 2, "head_dim": HEAD_DIM}
    tensor = torch.randn(row.shape(sizes)).bfloat16()
    groups = torch.tensor([[1, 0]])
    found = merged_slice(
        tensor, row, sizes=sizes, kept={"q_per_kv": groups[:, :1]}, ranks=HeadRanks(groups)
    )
    exact = 2 * tensor[HEAD_DIM:].double() - tensor[:HEAD_DIM].double()
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.bfloat16())


def test_merging_changes_query_projections_alone(pico: PicoMaker, tmp_path: Path) -> None:
    model = pico("qwen2", num_attention_heads=8)
    for merge in (True, False):
        prune_to(model, tmp_path / str(merge), merge_heads=merge, q_per_kv=2, kv_heads=1, ffn=48)
    merged, plain = (load_file(tmp_path / str(m) / "model.safetensors") for m in (True, False))
    assert merged.keys() == plain.keys()
    different = {n for n in merged if not torch.equal(merged[n], plain[n])}
    assert different == {n for n in merged if ".q_proj." in n}
