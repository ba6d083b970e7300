"""The scores file: what is written is what is read, and nothing else is accepted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from makers import PicoMaker
from paretron.artifacts.manifest import Provenance, verify
from paretron.artifacts.reader import Checkpoint
from paretron.data.tokens import build_token_store
from paretron.errors import Code, ParetronError
from paretron.importance.score import score_windows
from paretron.importance.scores import SCORES_JSON, SCORES_TENSORS, Scores, rank
from paretron.importance.stage import score_model
from paretron.importance.statistics import AGGREGATIONS
from paretron.recipe import Calibration, Score
from pico import pico_tokenizer

WINDOWS = list(torch.randint(0, 320, (6, 20), generator=torch.Generator().manual_seed(1)))


@pytest.fixture
def scores(pico: PicoMaker) -> Scores:
    return score_windows(Checkpoint.open(pico()), WINDOWS, score=Score(), block_sizes=(2,), seed=7)


def test_round_trip(scores: Scores, tmp_path: Path) -> None:
    scores.save(tmp_path)
    loaded = Scores.load(tmp_path)
    assert loaded.info == scores.info
    for axis, statistics in scores.statistics.items():
        assert torch.equal(loaded.statistics[axis].sums, statistics.sums)
        assert torch.equal(loaded.statistics[axis].squares, statistics.squares)
        assert loaded.statistics[axis].samples == len(WINDOWS)
    assert json.loads((tmp_path / SCORES_JSON).read_text())["schema"] == 1


def test_what_is_in_it(scores: Scores) -> None:
    info = scores.info
    assert (info.samples, info.tokens, info.seq_len, info.seed) == (6, 120, 20, 7)
    assert set(info.axes) == {"heads", "ffn", "hidden"}
    assert [len(info.influence[n]) for n in (1, 2)] == [4, 3]
    assert info.losses is not None
    assert [len(info.losses.blocks[n]) for n in (1, 2)] == [4, 3]
    for axis, units in {"ffn": 96, "heads": 4, "kv_heads": 2}.items():
        values = scores.values(axis, 1, batch="l2", sequence="mean")
        assert values.shape == (units,)
    assert scores.values("hidden", batch="l2", sequence="mean").shape == (64,)


def test_kv_group_is_the_sum_of_its_query_heads(scores: Scores) -> None:
    for batch in AGGREGATIONS:
        for sequence in AGGREGATIONS:
            heads = scores.values("heads", 2, batch=batch, sequence=sequence)
            groups = scores.values("kv_heads", 2, batch=batch, sequence=sequence)
            assert torch.equal(groups, torch.stack((heads[0] + heads[1], heads[2] + heads[3])))


def test_ranking_is_best_first_and_equals_go_by_number(scores: Scores) -> None:
    ranking = scores.ranking("ffn", 0, batch="l2", sequence="mean")
    values = scores.values("ffn", 0, batch="l2", sequence="mean")
    assert torch.equal(values[ranking], values.sort(descending=True).values)
    assert rank(torch.zeros(1000)).tolist() == list(range(1000))
    assert rank(torch.tensor([1.0, 3.0, 1.0, 3.0, 2.0])).tolist() == [1, 3, 4, 0, 2]


def test_widths_alone_need_no_losses(pico: PicoMaker) -> None:
    scores = score_windows(Checkpoint.open(pico()), WINDOWS, score=Score())
    assert scores.info.losses is None
    assert list(scores.info.influence) == [1]


def test_one_by_one_is_asked_for(pico: PicoMaker) -> None:
    score = Score.model_validate({"depth": {"contiguous": False, "samples": 3}})
    losses = score_windows(
        Checkpoint.open(pico()), WINDOWS, score=score, block_sizes=(1, 3)
    ).info.losses
    assert losses is not None
    assert losses.samples == 3
    assert list(losses.blocks) == [1]
    assert len(losses.greedy) == 3
    assert losses.greedy[0][1] == min(losses.blocks[1])


def _edit(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        info = json.loads((folder / SCORES_JSON).read_text())
        change(info)
        (folder / SCORES_JSON).write_text(json.dumps(info))

    return apply


def _edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / SCORES_TENSORS)
        change(tensors)
        save_file(tensors, folder / SCORES_TENSORS)

    return apply


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda d: (d / SCORES_JSON).unlink(), Code.INPUT_MISSING),
        (lambda d: (d / SCORES_TENSORS).unlink(), Code.INPUT_MISSING),
        (lambda d: (d / SCORES_JSON).write_text("{"), Code.INPUT_CONFIG),
        (_edit(lambda i: i.update(schema=2)), Code.INPUT_CONFIG),
        (_edit(lambda i: i.update(extra=1)), Code.INPUT_CONFIG),
        (_edit(lambda i: i.pop("samples")), Code.INPUT_CONFIG),
        (_edit_tensors(lambda t: t.pop("ffn.sums")), Code.INPUT_SHAPE),
        (_edit_tensors(lambda t: t.update(x=torch.ones(1))), Code.INPUT_SHAPE),
        (_edit_tensors(lambda t: t["ffn.sums"].fill_(float("nan"))), Code.INPUT_NONFINITE),
        (
            _edit_tensors(lambda t: t.update({"ffn.sums": t["ffn.sums"].float()})),
            Code.INPUT_NONFINITE,
        ),
        (
            lambda d: (d / SCORES_TENSORS).write_bytes((d / SCORES_TENSORS).read_bytes()[:-1]),
            Code.INPUT_TRUNCATED,
        ),
    ],
)
def test_damaged_files_are_refused(
    scores: Scores, tmp_path: Path, damage: Callable[[Path], None], code: Code
) -> None:
    folder = tmp_path / "scores"
    folder.mkdir()
    scores.save(folder)
    damage(folder)
    with pytest.raises(ParetronError) as caught:
        Scores.load(folder)
    assert caught.value.problems[0].code is code


def _store(folder: Path, text: str) -> Path:
    build_token_store([text], pico_tokenizer(), folder, eos_token_id=1)
    return folder


def _score(model: Path, store: Path, out: Path, seq_len: int = 16) -> list[tuple[str, object]]:
    events: list[tuple[str, object]] = []
    score_model(
        model,
        store,
        score=Score(micro_batch=3),
        calibration_settings=Calibration(path="unused.txt", samples=8, seq_len=seq_len),
        block_sizes=(2,),
        seed=5,
        out=out,
        provenance=Provenance(kind="scores"),
        on_event=lambda kind, fields: events.append((kind, dict(fields))),
    )
    return events


def test_stage_publishes_the_same_bytes_twice(pico: PicoMaker, tmp_path: Path) -> None:
    model = pico()
    store = _store(tmp_path / "store", "the cat sat on the mat, and the dog ran. " * 60)
    events = _score(model, store, tmp_path / "a")
    _score(model, store, tmp_path / "b")
    verify(tmp_path / "a")
    for name in (SCORES_JSON, SCORES_TENSORS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert Scores.load(tmp_path / "a").info.samples == 8
    assert events[0][0] == "note"
    progress = [fields for kind, fields in events if kind == "progress"]
    assert progress[-1] == {"done": 8, "total": 8, "unit": "samples"}


@pytest.mark.parametrize(("text", "seq_len"), [("the cat", 16), ("the cat " * 2000, 1024)])
def test_stage_refuses_too_little_text_and_too_long_windows(
    pico: PicoMaker, tmp_path: Path, text: str, seq_len: int
) -> None:
    store = _store(tmp_path / "store", text)
    with pytest.raises(ParetronError) as caught:
        _score(pico(), store, tmp_path / "out", seq_len=seq_len)
    assert caught.value.problems[0].code is Code.INPUT_CORPUS
    assert not (tmp_path / "out").exists()


def test_layers_are_ranked_by_what_was_measured(pico: PicoMaker) -> None:
    checkpoint = Checkpoint.open(pico())
    for depth in (
        {"metric": "loss", "contiguous": False},
        {"metric": "magnitude"},
        {"metric": "bi"},
    ):
        score = Score.model_validate({"depth": depth})
        found = score_windows(checkpoint, WINDOWS, score=score, block_sizes=(2,))
        assert found.info.depth() == score.depth
