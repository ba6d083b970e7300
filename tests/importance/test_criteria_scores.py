"""A criterion in the scores file: what is ranked by, what is refused, what is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from makers import PicoMaker
from paretron.artifacts.manifest import Provenance
from paretron.artifacts.reader import Checkpoint
from paretron.data.tokens import build_token_store
from paretron.errors import Code, ParetronError
from paretron.importance.criteria import CRITERIA
from paretron.importance.picture import scores_page
from paretron.importance.score import score_windows
from paretron.importance.scores import SCORES_JSON, Scores
from paretron.importance.stage import score_model
from paretron.importance.tables import score_tables
from paretron.recipe import Calibration, Score, resolve_recipe
from paretron.surgery.selection import choose
from pico import pico_tokenizer
from picorun import RECIPE


def _scores(model: Path, **settings: Any) -> Scores:
    windows = list(torch.randint(0, 320, (3, 12), generator=torch.Generator().manual_seed(2)))
    score = Score.model_validate(settings)
    return score_windows(Checkpoint.open(model), windows, score=score, block_sizes=(2,), seed=1)


@pytest.mark.parametrize("name", CRITERIA)
def test_selection_follows_the_criterion_of_the_file(
    pico: PicoMaker, tmp_path: Path, name: str
) -> None:
    made = _scores(pico(), criterion=name)
    made.save(tmp_path)
    scores = Scores.load(tmp_path)
    size = {**scores.info.sizes, "ffn": 40, "hidden": 32, "q_per_kv": 1, "kv_heads": 1}
    selection = choose(scores, sizes=size, score=Score(criterion=name))  # type: ignore[arg-type]
    for i in range(4):
        best = made.units["ffn"][i].topk(40).indices
        assert selection.units[i]["ffn"].tolist() == sorted(best.tolist())
        heads = made.units["heads"][i].view(2, 2)
        groups = made.units["kv_heads"][i] if "kv_heads" in made.units else heads.sum(1)
        group = int(groups.argmax())
        assert selection.units[i]["kv_heads"].tolist() == [group]
        assert selection.units[i]["q_per_kv"].tolist() == [[int(heads[group].argmax())]]
    best = made.units["hidden"][0].topk(32).indices
    assert selection.shared["hidden"].tolist() == sorted(best.tolist())
    text = score_tables(scores, Score())[0].text()
    assert f"units by {name}" in text
    assert f"units by {name}" in scores_page(scores, Score())
    # Activations are there all the same.
    plain = _scores(tmp_path.parent / tmp_path.name / "model")
    assert torch.equal(scores.statistics["ffn"].sums, plain.statistics["ffn"].sums)


def test_another_criterion_is_refused_by_field(pico: PicoMaker) -> None:
    scores = _scores(pico(), criterion="magnitude")
    with pytest.raises(ParetronError) as caught:
        choose(scores, sizes={**scores.info.sizes, "ffn": 40}, score=Score())
    (problem,) = caught.value.problems
    assert (problem.code, problem.where) == (Code.RUN_MISMATCH, "score.criterion")
    assert "magnitude" in problem.fix


def test_a_file_without_what_it_names_is_refused(pico: PicoMaker, tmp_path: Path) -> None:
    _scores(pico()).save(tmp_path)
    info = json.loads((tmp_path / SCORES_JSON).read_text())
    (tmp_path / SCORES_JSON).write_text(json.dumps(info | {"criterion": "taylor"}))
    with pytest.raises(ParetronError) as caught:
        Scores.load(tmp_path)
    assert caught.value.problems[0].code is Code.INPUT_SHAPE


@pytest.mark.parametrize("metric", ["random", "magnitude", "taylor"])
def test_layers_by_values_of_their_own(pico: PicoMaker, metric: str) -> None:
    scores = _scores(pico(num_hidden_layers=5), depth={"metric": metric})
    values = scores.info.layer_values[metric]
    assert scores.info.losses is None
    size = {**scores.info.sizes, "layers": 3}
    for contiguous in (False, True):
        score = Score.model_validate({"depth": {"metric": metric, "contiguous": contiguous}})
        gone = sorted(set(range(5)) - set(choose(scores, sizes=size, score=score).layers))
        if not contiguous:
            assert gone == sorted(sorted(range(5), key=lambda i: values[i])[:2])
            continue
        lengths = 1 if metric == "random" else 2
        start = min(range(4), key=lambda i: sum(values[i : i + lengths]))
        assert gone == [start, start + 1]
    assert metric in score_tables(scores, Score())[0].columns
    with pytest.raises(ParetronError) as caught:
        choose(_scores(scores_model(scores, pico)), sizes=size, score=score)
    assert caught.value.problems[0].where == "layers"


def scores_model(scores: Scores, pico: PicoMaker) -> Path:
    return pico(name="other", num_hidden_layers=scores.info.sizes["layers"])


@pytest.mark.parametrize("score", [{"criterion": "taylor"}, {"depth": {"metric": "taylor"}}])
def test_gradients_of_a_streamed_model_are_refused_when_the_recipe_is_read(
    score: dict[str, Any], tmp_path: Path
) -> None:
    raw = RECIPE | {"score": score | {"placement": "streamed"}}
    with pytest.raises(ParetronError) as caught:
        resolve_recipe(raw, where="recipe", base=tmp_path)
    (problem,) = caught.value.problems
    assert problem.code is Code.RECIPE_VALUE
    assert "score" in problem.where
    assert "whole model in memory" in problem.cause


def test_gradients_that_do_not_fit_are_refused_before_anything_runs(
    pico: PicoMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pico()
    room = 6 * sum(e.nbytes // 4 for e in Checkpoint.open(model).entries.values())
    monkeypatch.setattr("paretron.importance.placement.available_bytes", lambda device: room)
    assert _scores(model, placement="resident").units == {}
    with pytest.raises(ParetronError) as caught:
        _scores(model, criterion="taylor")
    assert caught.value.problems[0].code is Code.MEMORY


def test_two_processes_and_one(pico: PicoMaker, tmp_path: Path) -> None:
    """Units by fluctuation and layers by gradients: sums and gradients of both processes."""
    text = "the cat sat on the mat, and the dog ran after it; def main(self): return 1\n" * 40
    build_token_store([text], pico_tokenizer(), tmp_path / "store", eos_token_id=1)
    found = []
    for processes in (1, 2):
        score_model(
            pico(name=f"model{processes}"),
            tmp_path / "store",
            score=Score.model_validate(
                {
                    "criterion": "fluctuation", "micro_batch": 2, "processes": processes,
                    "depth": {"metric": "taylor"},
                }
            ),
            calibration_settings=Calibration(path="unused.txt", samples=5, seq_len=24),
            block_sizes=(2,),
            seed=5,
            out=tmp_path / f"scores{processes}",
            provenance=Provenance(kind="scores"),
            on_event=lambda kind, fields: None,
        )  # fmt: skip
        found.append(Scores.load(tmp_path / f"scores{processes}"))
    one, two = found
    for axis, values in one.units.items():
        scale = float(values.max())
        torch.testing.assert_close(two.units[axis], values, rtol=1e-6, atol=1e-6 * scale)
    taylor = [s.info.layer_values["taylor"] for s in found]
    assert taylor[1] == pytest.approx(taylor[0], rel=1e-6)
