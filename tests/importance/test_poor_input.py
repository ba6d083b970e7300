"""Too little text, scores that are all equal, activations that are no numbers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from makers import PicoMaker
from paretron.artifacts.reader import Checkpoint
from paretron.errors import Code, ParetronError
from paretron.families import FAMILIES
from paretron.importance.collect import batches_of, observe
from paretron.importance.executor import LayerStack
from paretron.importance.score import score_windows
from paretron.importance.stream import StreamedStack
from paretron.importance.tables import score_tables, spread
from paretron.recipe import Score
from pico import pico_model


def _stack() -> LayerStack:
    return LayerStack(pico_model(), FAMILIES["llama"])


@pytest.mark.parametrize("windows", [[], [torch.empty(0, dtype=torch.long)]])
def test_no_sample_and_empty_samples(windows: list[torch.Tensor]) -> None:
    stack = _stack()
    with pytest.raises(ParetronError) as caught:
        observe(stack, stack.model.config.to_dict(), batches_of(windows, 2))
    assert caught.value.problems[0].code is Code.INPUT_CORPUS


def test_one_token_is_a_sample(pico: PicoMaker) -> None:
    """Of one sample over one position, every variance is zero and every rank still decided."""
    scores = score_windows(Checkpoint.open(pico()), [torch.tensor([5])], score=Score())
    assert scores.info.tokens == 1
    for values in (
        scores.values("ffn", 0, batch="var", sequence="mean"),
        scores.values("ffn", 0, batch="mean", sequence="var"),
    ):
        assert float(values.abs().max()) <= 1e-12
    assert spread(torch.zeros(4)) == 0.5


def test_equal_scores_go_by_number(pico: PicoMaker, tmp_path: Path) -> None:
    """Neurons made all alike: the order is that of their numbers, and the pages still work."""
    checkpoint = Checkpoint.open(pico())
    windows = list(torch.randint(0, 320, (3, 16), generator=torch.Generator().manual_seed(2)))
    stack = LayerStack(pico_model(), FAMILIES["llama"])
    with torch.no_grad():
        for name in ("mlp.gate_proj", "mlp.up_proj"):
            weight = stack.layers[1].get_submodule(name).get_parameter("weight")
            weight.copy_(weight[:1].expand_as(weight))
    observed = observe(stack, checkpoint.config, batches_of(windows, 2))
    sums = observed.axes["ffn"].sums[1]
    assert (sums == sums[:, :1]).all()
    scores = score_windows(checkpoint, windows, score=Score(), block_sizes=(2,))
    object.__setattr__(scores, "statistics", observed.axes)
    ranking = scores.ranking("ffn", 1, batch="l2", sequence="mean")
    assert ranking.tolist() == list(range(96))
    assert all(table.text() for table in score_tables(scores, Score()))


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("weight", "where"),
    [("mlp.up_proj", "model.layers.2.mlp.down_proj"), ("self_attn.v_proj", "2.self_attn.o_proj")],
)
def test_activations_that_are_no_numbers(
    pico: PicoMaker, weight: str, where: str, streamed: bool
) -> None:
    """Weights that are finite and too large: the module whose activations overflow is named."""
    checkpoint = Checkpoint.open(pico())
    stack = _stack()
    if streamed:
        stack = StreamedStack(checkpoint, dtype=torch.float32, device=torch.device("cpu"))
    broken = stack.layers[2].get_submodule(weight)
    broken.register_forward_hook(lambda _m, _a, out: out * 1e38)
    windows = list(torch.randint(0, 320, (3, 16), generator=torch.Generator().manual_seed(2)))
    with pytest.raises(ParetronError) as caught:
        observe(stack, checkpoint.config, batches_of(windows, 2))
    problem = caught.value.problems[0]
    assert problem.code is Code.GATE_NONFINITE
    assert problem.where.endswith(where)


def test_a_task_without_lm_eval_is_refused_before_any_pass(
    pico: PicoMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    score = Score.model_validate({"depth": {"metric": "task", "task": "winogrande"}})
    events: list[str] = []
    with pytest.raises(ParetronError) as caught:
        score_windows(
            Checkpoint.open(pico()), [torch.tensor([5, 6])], score=score, block_sizes=(1,),
            on_event=lambda kind, fields: events.append(kind),
        )  # fmt: skip
    assert caught.value.problems[0].code is Code.OPTIONAL_MISSING
    assert caught.value.exit_code == 6
    assert "progress" not in events
