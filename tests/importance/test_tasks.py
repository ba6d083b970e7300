"""A task's accuracy: that of lm-eval itself, also without layers."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from makers import PicoMaker
from paretron.artifacts.models import load_model, load_tokenizer
from paretron.artifacts.reader import Checkpoint
from paretron.errors import Code, ParetronError
from paretron.importance.depth import Evaluator, block_removals
from paretron.importance.executor import LayerStack
from paretron.importance.score import score_windows
from paretron.importance.tasks import task_measure
from paretron.recipe import Score

pytest.importorskip("lm_eval", reason="lm-eval is an extra")

DOCUMENTS = 40
WORDS = ("the", "cat", "sat", "on", "mat", "and", "dog", "ran", "after", "it", "because", "sun")


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A task of 40 documents with two to four choices, random but the same every time."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    rng, lines = random.Random(4), []
    for number in range(DOCUMENTS):
        choices = [" ".join(rng.choices(WORDS, k=2)) for _ in range(number % 3 + 2)]
        question = " ".join(rng.choices(WORDS, k=rng.randint(2, 9)))
        gold = rng.randrange(len(choices))
        lines.append(json.dumps({"question": question, "choices": choices, "gold": gold}))
    (tmp_path / "documents.jsonl").write_text("\n".join(lines) + "\n")
    file = tmp_path / "pico_choice.yaml"
    file.write_text(
        "task: pico_choice\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'documents.jsonl'}}}}}\n"
        "output_type: multiple_choice\ntest_split: test\n"
        'doc_to_text: "{{question}}:"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: gold\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    yield file
    os.environ.pop("HF_DATASETS_OFFLINE", None)


def _by_lm_eval(model: torch.nn.Module, folder: Path, task: Path) -> float:
    """The accuracy by lm-eval's own evaluation of a transformers model."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=model, tokenizer=load_tokenizer(folder), batch_size=3, device="cpu")
    found = simple_evaluate(
        model=lm,
        tasks=[str(task)],
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),  # reading them all takes its time
    )
    return float(found["results"]["pico_choice"]["acc,none"])


def test_accuracies_are_those_of_lm_eval(pico: PicoMaker, task: Path) -> None:
    folder = pico("qwen3")
    checkpoint = Checkpoint.open(folder)
    model = load_model(folder)
    measure = task_measure(checkpoint, str(task), documents=DOCUMENTS, micro_batch=6)
    evaluator = Evaluator(LayerStack(model, checkpoint.family), measure)
    found = block_removals(evaluator, block_sizes=(2,))
    assert found.baseline == pytest.approx(_by_lm_eval(model, folder, task), abs=1e-12)
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList([layers[0], layers[3]])
    model.config.use_cache = False  # its layers have kept their numbers
    assert found.blocks[2][1] == pytest.approx(_by_lm_eval(model, folder, task), abs=1e-12)
    assert len({found.baseline, *found.blocks[2]}) > 1  # else nothing was compared


def test_scores_hold_a_tasks_accuracies(pico: PicoMaker, task: Path) -> None:
    windows = list(torch.randint(0, 320, (4, 12), generator=torch.Generator().manual_seed(1)))
    settings = {"depth": {"metric": "task", "task": str(task), "samples": 10}}
    found = score_windows(
        Checkpoint.open(pico()), windows, score=Score.model_validate(settings), block_sizes=(2,)
    ).info
    assert found.losses is None
    assert found.accuracies is not None
    assert (found.accuracies.samples, found.accuracies.task) == (10, str(task))
    assert [len(found.accuracies.blocks[n]) for n in (1, 2)] == [4, 3]
    assert all(0 <= x <= 1 for x in found.accuracies.blocks[1])


@pytest.mark.parametrize(
    ("edit", "code"),
    [
        (("output_type: multiple_choice", "output_type: generate_until"), Code.UNSUPPORTED),
        (("doc_to_target: gold", "doc_to_target: !function x.y"), Code.UNSUPPORTED),
        (("task: pico_choice", "include: other.yaml"), Code.UNSUPPORTED),
        (("documents.jsonl", "absent.jsonl"), Code.RECIPE_VALUE),
    ],
)
def test_other_tasks_are_refused(
    pico: PicoMaker, task: Path, edit: tuple[str, str], code: Code
) -> None:
    task.write_text(task.read_text().replace(*edit))
    with pytest.raises(ParetronError) as caught:
        task_measure(Checkpoint.open(pico()), str(task), documents=4, micro_batch=2)
    assert caught.value.problems[0].code is code
