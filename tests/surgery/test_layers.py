"""Merged layers: LaCo's formula against a direct computation, alone and with all else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from makers import PicoMaker
from paretron.artifacts.reader import Checkpoint
from paretron.compensate.trimmed import Trimmed
from paretron.errors import Code, ParetronError
from paretron.families import sizes
from paretron.families.table import with_sizes
from paretron.plan.plan import make_plan
from paretron.recipe import Prune, Score, load_recipe, resolve_recipe
from paretron.surgery.layers import merged_into
from paretron.surgery.prune import Cut, write_pruned
from paretron.surgery.selection import Selection, choose
from picocompensated import compensated
from picorun import RECIPE, write_pico_recipe
from picoscores import random_scores

MERGE = Prune(merge_heads=False, layers="merge")


def _without(selection: Selection, kept: tuple[int, ...]) -> Selection:
    return Selection(
        kept,
        selection.shared,
        {i: selection.units[i] for i in kept},
        {i: selection.head_ranks[i] for i in kept},
    )


def _merged(
    model: Path, out: Path, kept: tuple[int, ...], *, prune: Prune = MERGE, **new: int
) -> tuple[Checkpoint, Checkpoint]:
    teacher = Checkpoint.open(model)
    have = sizes(teacher.family, teacher.config)
    size = have | new
    selection = choose(random_scores(teacher), sizes=size, score=Score())
    out.mkdir(parents=True)
    write_pruned(
        teacher, _without(selection, kept), out, sizes=size | {"layers": len(kept)}, prune=prune
    )
    return teacher, Checkpoint.open(out)


@pytest.mark.parametrize(
    ("kept", "into"),
    [
        ((0, 3), {0: (1, 2), 3: ()}),
        ((0, 1), {0: (), 1: (2, 3)}),
        ((2,), {2: (0, 1, 3)}),
        ((1, 2, 3), {1: (0,), 2: (), 3: ()}),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_stays_takes_the_differences_of_what_goes(
    pico: PicoMaker,
    tmp_path: Path,
    kept: tuple[int, ...],
    into: dict[int, tuple[int, ...]],
    dtype: str,
) -> None:
    assert merged_into(kept, 4) == into
    teacher, student = _merged(pico("qwen2", dtype=dtype), tmp_path / "out", kept)
    for new, old in enumerate(kept):
        for row in teacher.family.rows(teacher.config, old):
            own = teacher.read(row.name.format(i=old))
            wanted = own.double()
            if "norm" not in row.name:
                for gone in into[old]:
                    wanted = wanted + teacher.read(row.name.format(i=gone)).double() - own.double()
            found = student.read(row.name.format(i=new))
            assert found.dtype == own.dtype
            exact = {"rtol": 1e-6, "atol": 1e-6} if dtype == "float32" else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(found, wanted.float().to(own.dtype), **exact)
    assert torch.equal(student.read("lm_head.weight"), teacher.read("lm_head.weight"))


def test_small_blocks_and_width_and_heads_with_it(pico: PicoMaker, tmp_path: Path) -> None:
    """Units are cut by the layer that stays, heads merged after layers; blocks change nothing."""
    prune = Prune(merge_heads=True, layers="merge")
    new = {"ffn": 40, "hidden": 48, "q_per_kv": 1}
    model = pico("mistral")
    teacher, whole = _merged(model, tmp_path / "out", (0, 3), prune=prune, **new)
    size = sizes(teacher.family, teacher.config) | new
    selection = _without(choose(random_scores(teacher), sizes=size, score=Score()), (0, 3))
    cut = Cut.plan(
        teacher, selection, sizes=size | {"layers": 2}, prune=prune, block_bytes=256
    )  # fmt: skip
    parts: dict[str, list[torch.Tensor]] = {}
    for piece, rows in cut.cutter.blocks(cut.pieces):
        parts.setdefault(piece.target, []).append(rows)
    assert len(parts["model.layers.0.mlp.up_proj.weight"]) > 4
    for name, blocks in parts.items():
        assert torch.equal(torch.cat(blocks), whole.read(name))
    # A merged model that is cut afterwards is the same.
    between = tmp_path / "between"
    _merged(model, between, (0, 3))
    merged = Checkpoint.open(between)
    renumbered = Selection(
        (0, 1),
        selection.shared,
        {k: selection.units[i] for k, i in enumerate((0, 3))},
        {k: selection.head_ranks[i] for k, i in enumerate((0, 3))},
    )
    after = tmp_path / "after"
    after.mkdir()
    write_pruned(merged, renumbered, after, sizes=size | {"layers": 2}, prune=prune)
    for name, blocks in parts.items():
        torch.testing.assert_close(
            torch.cat(blocks), Checkpoint.open(after).read(name), rtol=1e-5, atol=1e-6
        )


def test_experts_merge_with_those_of_their_number(pico: PicoMaker, tmp_path: Path) -> None:
    teacher, student = _merged(pico("mixtral"), tmp_path / "out", (0, 2, 3), experts=2)
    have = sizes(teacher.family, teacher.config) | {"experts": 2}
    kept = choose(random_scores(teacher), sizes=have, score=Score()).units[0]["experts"]
    name = "model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight"
    for new, old in enumerate(kept.tolist()):
        own, other = (teacher.read(name.format(i=i, e=old)) for i in (0, 1))
        torch.testing.assert_close(student.read(name.format(i=0, e=new)), own + (other - own))


@pytest.mark.parametrize("family", ["gemma2", "smollm3", "qwen3_moe"])
def test_layers_of_several_kinds_are_refused(pico: PicoMaker, tmp_path: Path, family: str) -> None:
    """Sliding and full attention, with and without rotary embedding, with and without experts."""
    with pytest.raises(ParetronError) as caught:
        _merged(pico(family), tmp_path / "out", (0, 1, 3))
    (problem,) = caught.value.problems
    assert (problem.code, problem.where) == (Code.UNSUPPORTED, "prune.layers")
    assert "2 kinds" in problem.cause
    assert list((tmp_path / "out").iterdir()) == []
    _merged(tmp_path / "model", tmp_path / "width", (0, 1, 2, 3), hidden=48)  # no layer goes


def test_the_plan_says_so_before_anything_runs(tmp_path: Path) -> None:
    recipe = write_pico_recipe(
        tmp_path, family="smollm3", prune={"layers": "merge"}, profile=None,
        export=[{"to": "hf"}],
    )  # fmt: skip
    plan = make_plan(load_recipe(recipe), out=tmp_path / "run", offline=True)
    (problem,) = plan.problems
    assert problem.where == "prune.layers"


def test_a_search_does_not_merge(tmp_path: Path) -> None:
    search = {"space": {"layers": [2, 3]}, "budget": {"params": 10**6}, "rounds": [100]}
    raw = RECIPE | {"students": {"found": {"search": search}}, "prune": {"layers": "merge"}}
    with pytest.raises(ParetronError) as caught:
        resolve_recipe(raw, where="recipe", base=tmp_path)
    assert "prune.layers must be drop" in str(caught.value)


def test_a_merge_that_half_precision_cannot_hold(pico: PicoMaker, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = pico()
    weights = load_file(model / "model.safetensors")
    for i in (1, 2):
        weights[f"model.layers.{i}.mlp.up_proj.weight"][0, 0] = 6e4
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    prune = MERGE.model_copy(update={"dtype": "float16"})
    with pytest.raises(ParetronError) as caught:
        _merged(model, tmp_path / "out", (0, 3), prune=prune)
    (problem,) = caught.value.problems
    assert problem.code is Code.GATE_NONFINITE
    assert "up_proj" in problem.where


def test_compensation_starts_from_the_merged_weights(pico: PicoMaker, tmp_path: Path) -> None:
    """In an equal basis too; what a refit does not touch comes out merged."""
    teacher = Checkpoint.open(pico("qwen2"))
    size = sizes(teacher.family, teacher.config) | {"layers": 2}
    selection = choose(random_scores(teacher), sizes=size, score=Score())
    into = merged_into(selection.layers, 4)
    new = next(k for k, gone in enumerate(into.values()) if gone)
    old = selection.layers[new]

    def merged(name: str) -> torch.Tensor:
        own = teacher.read(name.format(i=old))
        return own + sum(teacher.read(name.format(i=i)) - own for i in into[old])

    config = with_sizes(teacher.family, teacher.config, size, kept_layers=selection.layers)
    name = "model.layers.{i}.mlp.up_proj.weight"
    for basis in (None, torch.eye(64)):
        trimmed = Trimmed(
            teacher, selection, config, basis=basis, merge_heads=False, merge_layers=True
        )
        wanted = merged(name)
        if basis is not None:  # what reads a norm has taken over its weight, the kept layer's
            wanted = wanted * teacher.read(
                f"model.layers.{old}.post_attention_layernorm.weight"
            )  # fmt: skip
        torch.testing.assert_close(trimmed.half(new, 1)[name.format(i=new)], wanted)
    compensated(teacher.path, tmp_path / "out", prune=MERGE, new={"layers": 2}, rotate=False)
    student, name = Checkpoint.open(tmp_path / "out"), "model.layers.{i}.self_attn.k_proj.bias"
    torch.testing.assert_close(student.read(name.format(i=new)), merged(name))
