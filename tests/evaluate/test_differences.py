"""Intervals and paired differences: right where the answer is known, refused where none is."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from makers import PicoMaker
from paretron.artifacts.manifest import Provenance
from paretron.artifacts.models import load_tokenizer
from paretron.data.tokens import build_token_store
from paretron.errors import Code, ParetronError
from paretron.evaluate.differences import differences
from paretron.evaluate.intervals import paired_shares, ratio_interval, t_quantile
from paretron.evaluate.stage import evaluate_model
from paretron.recipe import Evaluate

# Of printed tables: two-sided 95 %.
TABLE = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 9: 2.2622, 10: 2.2281, 30: 2.0423,
         120: 1.9799, 199: 1.9720, 200: 1.9719, 1000: 1.9623, 10**7: 1.9600}  # fmt: skip


@pytest.mark.parametrize(("freedom", "expected"), TABLE.items())
def test_students_t(freedom: int, expected: float) -> None:
    assert t_quantile(freedom) == pytest.approx(expected, abs=5e-5)


def test_the_expansion_goes_on_where_the_closed_form_ends() -> None:
    steps = [t_quantile(n) - t_quantile(n + 1) for n in range(195, 205)]
    assert all(0 < later < earlier for earlier, later in pairwise(steps))


def test_units_of_one_size_have_the_textbooks_interval() -> None:
    values = [2.0, 3.5, 1.0, 4.0, 2.5]
    mean, low, high = ratio_interval(values, [1] * 5)
    reach = 2.7764 * float(np.std(values, ddof=1)) / math.sqrt(5)
    assert mean == pytest.approx(2.6)
    assert (low, high) == pytest.approx((2.6 - reach, 2.6 + reach), abs=1e-4)


def test_one_unit_says_nothing_of_the_spread() -> None:
    assert ratio_interval([6.0], [3]) == (2.0, None, None)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Documents of very different lengths, each with a level of its own: 95 % within noise.

    Tokens as if independent would give intervals that hold it far more seldom.
    """
    generator, held, tokenwise, runs, truth = np.random.default_rng(0), 0, 0, 2000, 3.0
    for _ in range(runs):
        sizes = generator.integers(5, 200, 40)
        levels = generator.normal(truth, 0.5, 40)
        sums = sizes * levels + generator.normal(0, 1.0, 40) * np.sqrt(sizes)
        mean, low, high = ratio_interval(sums.tolist(), sizes.tolist())
        assert low is not None
        assert high is not None
        held += low <= truth <= high
        tokenwise += abs(mean - truth) <= 1.96 * math.sqrt(1.25 / sizes.sum())
    assert 0.93 <= held / runs <= 0.965
    assert tokenwise / runs < 0.6


@pytest.fixture
def evaluated(pico: PicoMaker, tmp_path: Path) -> tuple[Path, Path]:
    """A teacher's and a student's evaluation, by document, the student's weights all but equal."""
    folders = []
    teacher = pico(num_hidden_layers=2, name="teacher")
    student = pico(num_hidden_layers=2, name="student", dtype="bfloat16")
    texts = [f"the cat sat on mat {i} " * (1 + i % 5) for i in range(30)]
    store = build_token_store(texts, load_tokenizer(teacher), tmp_path / "s", eos_token_id=1)
    for model in (teacher, student):
        folders.append(tmp_path / f"{model.name}-evaluation")
        evaluate_model(
            model,
            {"validation": (store.folder, 16)},
            settings=Evaluate(by="document"),
            out=folders[-1],
            provenance=Provenance("evaluation"),
            on_event=lambda kind, fields: None,
        )
    return folders[0], folders[1]


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def test_pairs_say_more_than_two_intervals(evaluated: tuple[Path, Path]) -> None:
    before, after = (read(f, "evaluation.json")["texts"]["validation"] for f in evaluated)
    found = differences(*evaluated)
    assert list(found) == ["loss.validation"]
    apart = found["loss.validation"]
    assert apart["value"] == pytest.approx(after["loss"] - before["loss"], abs=1e-12)
    assert apart["pairs"] == 30
    assert apart["low"] < apart["value"] < apart["high"]
    unpaired = math.hypot(before["high"] - before["low"], after["high"] - after["low"])
    assert apart["high"] - apart["low"] < unpaired / 10
    # Turned round, it is the negative.
    back = differences(*reversed(evaluated))["loss.validation"]
    assert (back["low"], back["high"]) == pytest.approx((-apart["high"], -apart["low"]))


def test_what_every_document_cost_lies_beside(evaluated: tuple[Path, Path]) -> None:
    loss = read(evaluated[0], "evaluation.json")["texts"]["validation"]
    units = read(evaluated[0], "windows.json")["texts"]["validation"]
    assert (units["per"], units["seq_len"], units["stride"]) == ("document", 16, 8)
    assert sum(units["tokens"]) == loss["tokens"]
    assert sum(units["nats"]) / loss["tokens"] == pytest.approx(loss["loss"], rel=1e-12)
    assert ratio_interval(units["nats"], units["tokens"])[1:] == (loss["low"], loss["high"])


@pytest.mark.parametrize("change", ["text", "tokens", "name"])
def test_other_texts_are_no_pairs(change: str, evaluated: tuple[Path, Path]) -> None:
    path = evaluated[1] / "windows.json"
    windows = json.loads(path.read_text())
    text = windows["texts"].pop("validation")
    if change == "text":
        text["text"] = "0" * 64
    if change == "tokens":
        text["tokens"][0] += 1
    windows["texts"] = {"train" if change == "name" else "validation": text}
    path.write_text(json.dumps(windows))
    assert differences(*evaluated) == {}


def with_task(folder: Path, name: str, scores: list[float], **about: Any) -> None:
    evaluation = read(folder, "evaluation.json")
    value = sum(scores) / len(scores)
    evaluation["tasks"][name] = {"metric": "acc", "value": value, "few_shot": 0} | about
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "samples").mkdir(exist_ok=True)
    lines = [json.dumps({"doc": k, "score": s}) for k, s in enumerate(scores)]
    (folder / f"samples/{name}.jsonl").write_text("\n".join(lines) + "\n")


def test_tasks_are_paired_by_their_documents(evaluated: tuple[Path, Path]) -> None:
    teacher, student = evaluated
    with_task(teacher, "mmlu", [1, 1, 0, 1, 1, 0, 1, 1])
    with_task(student, "mmlu", [1, 0, 0, 1, 1, 0, 0, 1])
    with_task(teacher, "shorter", [1, 1, 0])
    with_task(student, "shorter", [1, 1])
    with_task(teacher, "unanswered", [1])
    with_task(student, "unanswered", [1])
    (student / "samples/unanswered.jsonl").unlink()
    found = differences(teacher, student)
    assert sorted(found) == ["loss.validation", "task.mmlu"]
    apart = found["task.mmlu"]
    assert (apart["value"], apart["pairs"]) == (-0.25, 8)
    # One pair more each way: 1 of 10 gained, 3 of 10 lost.
    reach = 1.959964 * math.sqrt((0.1 + 0.3 - 0.2**2) / 10)
    assert (apart["low"], apart["high"]) == pytest.approx((-0.2 - reach, -0.2 + reach), abs=1e-5)
    with_task(teacher, "f1", [0.5, 1, 0.25])
    with_task(student, "f1", [0.5, 0.5, 0.5])
    apart = differences(teacher, student)["task.f1"]
    reach = 4.3027 * float(np.std([0, -0.5, 0.25], ddof=1)) / math.sqrt(3)
    assert apart["high"] - apart["value"] == pytest.approx(reach, abs=1e-4)


def test_what_was_asked_otherwise_is_no_pair(evaluated: tuple[Path, Path]) -> None:
    for folder, metric in zip(evaluated, ("acc", "acc_norm"), strict=True):
        with_task(folder, "arc", [1, 0], metric=metric)
        with_task(folder, "mmlu", [1, 0], few_shot=5 if metric == "acc" else 0)
    assert list(differences(*evaluated)) == ["loss.validation"]


def test_equal_answers_to_a_few_questions_do_not_prove_equality(
    evaluated: tuple[Path, Path],
) -> None:
    for folder in evaluated:
        with_task(folder, "short", [1, 0, 1, 1, 0, 1, 1, 1, 0, 1])
    apart = differences(*evaluated)["task.short"]
    assert apart["value"] == 0
    assert apart["high"] == -apart["low"] > 0.2


@pytest.mark.parametrize(
    ("total", "up", "down"), [(20, 0.02, 0.02), (40, 0.02, 0.1), (400, 0.1, 0.15)]
)
def test_paired_shares_hold_the_truth_as_often_as_they_say(
    total: int, up: float, down: float
) -> None:
    draws = np.random.default_rng(0).multinomial(total, [up, down, 1 - up - down], 3000)
    ends = [paired_shares(gained, lost, total) for gained, lost, _ in draws.tolist()]
    held = sum(low <= up - down <= high for low, high in ends) / len(ends)
    assert held >= 0.94


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("windows.json", "{", Code.INPUT_MANIFEST),
        ("windows.json", "{}", Code.INPUT_MANIFEST),
        ("windows.json", '{"texts": {"validation": {}}}', Code.INPUT_MANIFEST),
        ("windows.json", '{"texts": {"validation": 3}}', Code.INPUT_MANIFEST),
        ("evaluation.json", '{"texts": {}}', Code.INPUT_MANIFEST),
        ("evaluation.json", "[]", Code.INPUT_MANIFEST),
        ("samples/mmlu.jsonl", '{"doc": 0}\n', Code.INPUT_MANIFEST),
        ("samples/mmlu.jsonl", "1\n", Code.INPUT_MANIFEST),
        ("samples/mmlu.jsonl", '{"doc": 0, "score": "x"}\n', Code.INPUT_MANIFEST),
        ("samples/mmlu.jsonl", '{"doc": 0, "score": NaN}\n', Code.INPUT_MANIFEST),
        ("samples/mmlu.jsonl", '{"doc": [0], "score": 1}\n', Code.INPUT_MANIFEST),
    ],
)
def test_a_broken_evaluation_is_an_error_of_one_line(
    name: str, content: str, code: Code, evaluated: tuple[Path, Path]
) -> None:
    for folder in evaluated:
        with_task(folder, "mmlu", [1, 0])
    (evaluated[1] / name).write_text(content)
    with pytest.raises(ParetronError) as caught:
        differences(*evaluated)
    assert caught.value.problems[0].code is code


def test_a_folder_without_an_evaluation(evaluated: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ParetronError) as caught:
        differences(evaluated[0], tmp_path / "nothing")
    assert caught.value.problems[0].code is Code.INPUT_FILE
