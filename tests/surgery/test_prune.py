"""From checkpoint to checkpoint: equal to a masked model, byte for byte where nothing goes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from makers import PicoMaker
from paretron.artifacts.manifest import Provenance, verify
from paretron.artifacts.models import load_model
from paretron.artifacts.reader import Checkpoint
from paretron.errors import Code, ParetronError
from paretron.families import FAMILIES, expected_tensors, parameter_counts, sizes
from paretron.recipe import Prune, Score
from paretron.surgery.prune import Cut, prune, write_pruned
from paretron.surgery.selection import choose
from pico import PICO_FAMILIES, make_pico
from picoscores import IDS, gone, prune_to, random_scores
from reload import check_reload


@torch.no_grad()
def _logits(model: PreTrainedModel) -> torch.Tensor:
    return model(IDS, use_cache=False).logits


def _bytes_of(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {
        n: e.file.read_bytes()[e.start : e.start + e.nbytes] for n, e in checkpoint.entries.items()
    }


def _mute(model: PreTrainedModel, layer: int, matrix: str, columns: list[int]) -> None:
    with torch.no_grad():
        model.get_submodule(f"model.layers.{layer}.{matrix}").weight[:, columns] = 0


def _norms_over_heads(family: str) -> bool:
    """Whether a norm averages over all heads, so that muted heads are not gone ones."""
    return any(
        "kv_heads" in t.dims[0][0] and t.name.endswith("norm.weight")
        for t in FAMILIES[family].tensors
    )


@pytest.mark.parametrize("family", PICO_FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_keeping_everything_is_byte_identical(pico: PicoMaker, family: str, dtype: str) -> None:
    model = pico(family, dtype=dtype)
    out = model.parent / "out"
    prune_to(model, out, merge_heads=True)
    assert _bytes_of(Checkpoint.open(out)) == _bytes_of(Checkpoint.open(model))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (model / name).read_bytes()
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == dtype


@pytest.mark.parametrize("family", PICO_FAMILIES)
def test_pruned_neurons_equal_masked_ones(pico: PicoMaker, family: str) -> None:
    model = pico(family)
    selection = prune_to(model, model.parent / "out", ffn=40)
    masked = load_model(model)
    for layer in selection.layers:
        (reader,) = FAMILIES[family].readers("ffn")
        matrix = reader.name.removeprefix("model.layers.{i}.").removesuffix(".weight")
        _mute(masked, layer, matrix, gone(selection.units[layer]["ffn"], 96))
    torch.testing.assert_close(_logits(load_model(model.parent / "out")), _logits(masked))


@pytest.mark.parametrize("new", [{"kv_heads": 1}, {"q_per_kv": 1}, {"kv_heads": 1, "q_per_kv": 1}])
@pytest.mark.parametrize("family", [f for f in PICO_FAMILIES if not _norms_over_heads(f)])
def test_pruned_heads_equal_masked_ones(pico: PicoMaker, family: str, new: dict[str, Any]) -> None:
    model = pico(family)
    selection = prune_to(model, model.parent / "out", **new)
    masked = load_model(model)
    for layer in selection.layers:
        kept = selection.units[layer]
        groups = kept.get("kv_heads", torch.arange(2))
        queries = kept.get("q_per_kv", torch.arange(2).expand(len(groups), 2))
        heads = (groups[:, None] * 2 + queries).flatten()
        columns = [h * 32 + c for h in gone(heads, 4) for c in range(32)]
        _mute(masked, layer, "self_attn.o_proj", columns)
    torch.testing.assert_close(_logits(load_model(model.parent / "out")), _logits(masked))


@pytest.mark.parametrize("family", PICO_FAMILIES)
def test_pruned_layers_equal_removed_ones(pico: PicoMaker, family: str) -> None:
    model = pico(family)
    selection = prune_to(model, model.parent / "out", layers=2)
    assert len(selection.layers) == 2
    whole = load_model(model)
    whole.model.layers = torch.nn.ModuleList(whole.model.layers[i] for i in selection.layers)
    whole.config.num_hidden_layers = 2
    assert torch.equal(_logits(load_model(model.parent / "out")), _logits(whole))


def test_layer_types_go_with_their_layers(pico: PicoMaker) -> None:
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    model = pico(
        "qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=0, layer_types=kinds
    )
    selection = prune_to(model, model.parent / "out", layers=3)
    out = model.parent / "out"
    assert selection.layers != (0, 1, 2)
    config = json.loads((out / "config.json").read_text())
    assert config["layer_types"] == [kinds[i] for i in selection.layers]
    whole = load_model(model)
    whole.model.layers = torch.nn.ModuleList(whole.model.layers[i] for i in selection.layers)
    whole.config.num_hidden_layers = 3
    whole.config.layer_types = config["layer_types"]
    assert torch.equal(_logits(load_model(out)), _logits(whole))


def test_unknown_list_with_one_entry_a_layer_is_refused(pico: PicoMaker, tmp_path: Path) -> None:
    model = pico()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"no_rope_layers": [1, 0, 1, 0]}))
    prune_to(model, tmp_path / "width", ffn=32)
    with pytest.raises(ParetronError, match="no_rope_layers"):
        prune_to(model, tmp_path / "depth", layers=2)


def test_several_end_tokens_are_no_list_of_layers(pico: PicoMaker, tmp_path: Path) -> None:
    model = pico("llama", eos_token_id=[1, 2, 3, 4])
    prune_to(model, tmp_path / "depth", layers=2)
    assert Checkpoint.open(tmp_path / "depth").config["eos_token_id"] == [1, 2, 3, 4]


def test_llama_of_odd_width_is_written_as_mistral_with_equal_logits(pico: PicoMaker) -> None:
    """The same weights in a Llama whose config was spared its own check compute the same."""
    model = pico("llama")
    out = model.parent / "out"
    prune_to(model, out, hidden=42, ffn=40)
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["hidden_size"]) == ("mistral", 42)
    llama = load_model(model)
    narrow = llama.config
    narrow.intermediate_size = 40
    object.__setattr__(narrow, "hidden_size", 42)
    twin = type(llama)(narrow)
    twin.load_state_dict(load_file(out / "model.safetensors"))
    torch.testing.assert_close(_logits(load_model(out)), _logits(twin.eval()), rtol=0, atol=1e-6)


def test_tied_embeddings_stay_tied(pico: PicoMaker) -> None:
    model = pico("qwen3", tie_word_embeddings=True)
    out = model.parent / "out"
    prune_to(model, out, hidden=48, layers=3)
    assert "lm_head.weight" not in Checkpoint.open(out).entries
    check_reload(out)


def test_shards_and_cast(pico: PicoMaker) -> None:
    model = pico("llama")
    checkpoint = Checkpoint.open(model)
    size = sizes(checkpoint.family, checkpoint.config) | {"ffn": 64}
    selection = choose(random_scores(checkpoint), sizes=size, score=Score())
    folders = {}
    for name, settings_ in {
        "whole": Prune(merge_heads=False),
        "cast": Prune(merge_heads=False, dtype="bfloat16", max_shard_gb=1e-4),
    }.items():
        folders[name] = model.parent / name
        folders[name].mkdir()
        write_pruned(checkpoint, selection, folders[name], sizes=size, prune=settings_)
    assert len(list(folders["cast"].glob("model-*-of-*.safetensors"))) > 2
    whole, cast = (Checkpoint.open(folders[n]) for n in ("whole", "cast"))
    assert cast.config["dtype"] == cast.config["torch_dtype"] == "bfloat16"
    assert list(cast.entries) != []
    for name in whole.entries:
        assert torch.equal(cast.read(name), whole.read(name).bfloat16())


@settings(max_examples=30)
@given(
    family=st.sampled_from(PICO_FAMILIES),
    hidden=st.integers(8, 64),
    ffn=st.integers(1, 96),
    kv_heads=st.integers(1, 2),
    q_per_kv=st.integers(1, 3),
    layers=st.integers(1, 4),
    merge=st.booleans(),
    tied=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_feasible_target_loads(
    tmp_path_factory: pytest.TempPathFactory,
    family: str,
    merge: bool,
    tied: bool,
    seed: int,
    **new: int,
) -> None:
    if FAMILIES[family].hidden_multiple_of_heads and family != "llama":
        new["hidden"] -= new["hidden"] % (new["kv_heads"] * new["q_per_kv"])
    folder = tmp_path_factory.mktemp("any")
    config: dict[str, Any] = {
        "num_attention_heads": 6,
        "hidden_size": 66,
        "tie_word_embeddings": tied,
    }
    model = make_pico(folder / "model", family, seed=seed, **config)
    checkpoint = Checkpoint.open(model)
    scores = random_scores(checkpoint, seed=seed)
    prune_to(model, folder / "out", merge_heads=merge, scores=scores, **new)
    written = Checkpoint.open(folder / "out")
    assert sizes(written.family, written.config) == (
        sizes(checkpoint.family, checkpoint.config) | new
    )
    shapes = {n: e.shape for n, e in written.entries.items()}
    assert shapes == expected_tensors(written.family, written.config)
    loaded = load_model(folder / "out")
    total = parameter_counts(written.family, written.config).total
    assert sum(p.numel() for p in loaded.parameters()) == total
    check_reload(folder / "out")


def _prune(
    model: Path, scores: Path, out: Path, *, settings_: Prune | None = None, **new: int
) -> list[dict[str, Any]]:
    checkpoint = Checkpoint.open(model)
    events: list[dict[str, Any]] = []
    prune(
        model,
        scores,
        sizes=sizes(checkpoint.family, checkpoint.config) | new,
        prune=settings_ or Prune(),
        score=Score(),
        out=out,
        provenance=Provenance(kind="student"),
        on_event=lambda kind, fields: events.append({"kind": kind, **fields}),
    )
    return events


def _saved_scores(model: Path) -> Path:
    folder = model.parent / "scores"
    folder.mkdir(exist_ok=True)
    random_scores(Checkpoint.open(model)).save(folder)
    return folder


def test_stage_publishes_the_same_bytes_twice(pico: PicoMaker, tmp_path: Path) -> None:
    model = pico("qwen3")
    scores = _saved_scores(model)
    for name in ("a", "b"):
        events = _prune(model, scores, tmp_path / name, hidden=48, ffn=64, layers=3, q_per_kv=1)
    manifests = [verify(tmp_path / name) for name in ("a", "b")]
    assert manifests[0] == manifests[1]
    total = len(Checkpoint.open(tmp_path / "a").entries)
    assert events[-1] == {"kind": "progress", "done": total, "total": total, "unit": "tensors"}
    check_reload(tmp_path / "a")


def _break_weights(model: Path, scores: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("inf")
    save_file(weights, model / "model.safetensors")


def _other_sizes(model: Path, scores: Path) -> None:
    _edit(scores, lambda info: info["sizes"].update(ffn=95))


def _other_family(model: Path, scores: Path) -> None:
    _edit(scores, lambda info: info.update(model_type="qwen2"))


def _edit(scores: Path, change: Callable[[dict[str, Any]], object]) -> None:
    info = json.loads((scores / "scores.json").read_text())
    change(info)
    (scores / "scores.json").write_text(json.dumps(info))


@pytest.mark.parametrize(
    ("damage", "code", "text"),
    [
        (_break_weights, Code.INPUT_NONFINITE, "layers.1.mlp.up_proj"),
        (_other_sizes, Code.RUN_MISMATCH, "ffn 95"),
        (_other_family, Code.RUN_MISMATCH, "qwen2"),
    ],
)
def test_failure_publishes_nothing(
    pico: PicoMaker,
    tmp_path: Path,
    damage: Callable[[Path, Path], None],
    code: Code,
    text: str,
) -> None:
    model = pico("llama")
    scores = _saved_scores(model)
    damage(model, scores)
    with pytest.raises(ParetronError, match=text) as caught:
        _prune(model, scores, tmp_path / "out", ffn=64)
    assert caught.value.problems[0].code is code
    assert not list(tmp_path.glob("*out*/*"))


def test_scores_of_another_artifact_of_the_same_shape(pico: PicoMaker, tmp_path: Path) -> None:
    model = pico("llama")
    scores = _saved_scores(model)
    _prune(model, scores, tmp_path / "student", ffn=64)
    student_scores = _saved_scores(tmp_path / "student")
    _edit(student_scores, lambda info: info.update(model_identity="0" * 64))
    with pytest.raises(ParetronError, match="another model"):
        _prune(tmp_path / "student", student_scores, tmp_path / "again", ffn=32)


@pytest.mark.parametrize("new", [{"hidden": 48, "ffn": 40}, {"kv_heads": 1}, {"layers": 2}])
@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral"])
def test_blocks_of_any_size_are_cut_alike(
    pico: PicoMaker, family: str, new: dict[str, int], tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(pico(family))
    size = sizes(checkpoint.family, checkpoint.config) | new
    if family == "mixtral":
        size |= {"experts": 3}
        size.pop("ffn", None)
    selection = choose(random_scores(checkpoint), sizes=size, score=Score())
    found = []
    for block_bytes in (1, 1000, 1 << 30):
        cut = Cut.plan(checkpoint, selection, sizes=size, prune=Prune(), block_bytes=block_bytes)
        out = tmp_path / str(block_bytes)
        out.mkdir()
        cut.write(out)
        found.append((out / "model.safetensors").read_bytes())
    assert found[0] == found[1] == found[2]


def test_a_dtype_that_cannot_hold_a_value_is_refused(pico: PicoMaker, tmp_path: Path) -> None:
    model = pico("llama")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(weights, model / "model.safetensors")
    scores = _saved_scores(model)
    for dtype in ("bfloat16", "float32"):
        _prune(model, scores, tmp_path / dtype, settings_=Prune(dtype=dtype))
    with pytest.raises(ParetronError, match=r"layers\.1\.mlp\.up_proj.*float16") as caught:
        _prune(model, scores, tmp_path / "half", settings_=Prune(dtype="float16"))
    assert caught.value.problems[0].code is Code.GATE_NONFINITE


def test_logits_that_are_not_finite_fail_the_reload_check(pico: PicoMaker) -> None:
    model = pico("llama")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][:] = 3e38
    save_file(weights, model / "model.safetensors")
    with pytest.raises(ParetronError) as caught:
        check_reload(model)
    assert caught.value.problems[0].code is Code.GATE_NONFINITE


def test_merged_heads_that_their_dtype_cannot_hold(pico: PicoMaker, tmp_path: Path) -> None:
    """2 a - b of two halves near the end of float16: nothing infinite may be written."""
    model = pico(dtype="float16", num_hidden_layers=2)
    tensors = load_file(model / "model.safetensors")
    projection = tensors["model.layers.1.self_attn.q_proj.weight"]
    projection.view(2, 2, -1)[:, 0], projection.view(2, 2, -1)[:, 1] = 60_000, -60_000
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    prune_to(model, tmp_path / "cut", q_per_kv=1)
    with pytest.raises(ParetronError, match=r"layers\.1\.self_attn\.q_proj") as caught:
        prune_to(model, tmp_path / "merged", q_per_kv=1, merge_heads=True)
    assert caught.value.problems[0].code is Code.GATE_NONFINITE
    assert "merge_heads" in caught.value.problems[0].fix
