"""Tasks: figures are those of a direct computation and of lm-eval's own model, and are kept."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from paretron.artifacts.journal import Journal
from paretron.artifacts.manifest import Provenance, verify
from paretron.artifacts.models import load_model, load_tokenizer
from paretron.data import harness
from paretron.data.answers import Judged, judged
from paretron.errors import Code, ParetronError
from paretron.evaluate.asking import ModelAsker
from paretron.evaluate.stage import evaluate_model
from paretron.evaluate.tasks import TaskScores, measure_tasks, pooled, task_score, wilson
from paretron.recipe import Evaluate
from picotask import TASK, documents, write_task

pytest.importorskip("lm_eval", reason="lm-eval is an extra")
pytestmark = pytest.mark.usefixtures("own_cache")

WORDS = ("dog", "cat", "bird", "runs", "sings", "here", "the", "queen", "sleeps", "fox")
Events = list[tuple[str, Mapping[str, Any]]]


def ask(
    model: Path, *tasks: Any, state: Path | None = None, events: Events | None = None, **more: Any
) -> TaskScores:
    def tell(kind: str, fields: Mapping[str, Any]) -> None:
        if events is not None:
            events.append((kind, fields))

    asker = ModelAsker(load_model(model), load_tokenizer(model), 5, tell)
    settings = Evaluate.model_validate({"tasks": list(tasks)} | more)
    return measure_tasks(asker, settings, model="a model", state=state, on_event=tell)


def directly(model: Path) -> list[float]:
    """Which documents of the bundled task are right: each sentence alone, in float64."""
    network, tokenizer = load_model(model, dtype=torch.float64), load_tokenizer(model)
    first = tokenizer.bos_token_id
    right = []
    for line in TASK.with_suffix(".jsonl").read_text().splitlines():
        document, sums = json.loads(line), []
        for choice in document["choices"]:
            ids = torch.tensor([[first, *tokenizer.encode(choice, add_special_tokens=False)]])
            with torch.inference_mode():
                logs = network(ids).logits.log_softmax(-1)[0, :-1]
            sums.append(float(logs.gather(1, ids[0, 1:, None]).sum()))
        right.append(float(sums.index(max(sums)) == document["gold"]))
    return right


def test_the_bundled_tasks_accuracy_is_a_direct_computations(learned: Path, tmp_path: Path) -> None:
    written = [json.loads(line) for line in TASK.with_suffix(".jsonl").read_text().splitlines()]
    assert written == [json.loads(line) for line in documents()]  # the file is what made it
    found = ask(learned, str(TASK))
    score, right = found.scores["agreement"], directly(learned)
    assert score.value == pytest.approx(sum(right) / len(right), abs=1e-6)
    assert list(found.samples["agreement"]) == right
    assert score.low is not None
    assert 0.65 < score.low < score.value < 1  # well above the half of chance, of pairs never read
    assert (score.metric, score.samples, score.few_shot) == ("acc", 72, 0)
    assert score.higher_is_better
    found.write_samples(tmp_path)
    lines = (tmp_path / "samples/agreement.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"doc": k, "score": s} for k, s in enumerate(right)
    ]


def test_an_evaluation_publishes_what_tasks_gave(learned: Path, tmp_path: Path) -> None:
    settings = Evaluate.model_validate({"perplexity": [], "tasks": [str(TASK)]})
    found = evaluate_model(
        learned, {}, settings=settings, out=tmp_path / "out", provenance=Provenance("evaluation"),
        on_event=lambda kind, fields: None,
    )  # fmt: skip
    written = json.loads((tmp_path / "out/evaluation.json").read_text())
    score = found.tasks["agreement"]
    assert written["tasks"]["agreement"] == {
        "metric": "acc", "value": score.value, "stderr": score.stderr, "low": score.low,
        "high": score.high, "samples": 72, "few_shot": 0, "higher_is_better": True,
    }  # fmt: skip
    assert written["left_out"] == {}
    assert (tmp_path / "out/samples/agreement.jsonl").is_file()
    verify(tmp_path / "out")


def drawn(seed: int, count: int) -> list[dict[str, Any]]:
    """Documents with words, choices of several lengths and some that share all but their end."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        stem = " ".join(rng.choices(WORDS, k=rng.randint(1, 4)))
        choices = [f"{stem} {word}" for word in rng.sample(WORDS, k=rng.randint(2, 4))]
        question = " ".join(rng.choices(WORDS, k=rng.randint(0, 9)))
        gold = rng.randrange(len(choices))
        made.append({"question": question, "choices": choices, "gold": gold, "answer": stem})
    return made


@pytest.fixture
def tasks(tmp_path: Path) -> dict[str, Path]:
    """A task of every way of asking."""
    lines = [json.dumps(d) for d in drawn(3, 24)]
    mean = "aggregation: mean, higher_is_better: true"
    return {
        "choice": write_task(
            tmp_path, "choice", lines, doc_to_text='"{{question}}:"',
            metric_list=f"[{{metric: acc, {mean}}}, {{metric: acc_norm, {mean}}}]",
        ),
        "rolling": write_task(
            tmp_path, "rolling", lines, output_type="loglikelihood_rolling", doc_to_choice="null",
            doc_to_target='"{{question}} {{answer}} {{question}}"',
            metric_list="[{metric: word_perplexity}]",
        ),
        "written": write_task(
            tmp_path, "written", lines, output_type="generate_until", doc_to_choice="null",
            doc_to_text='"the {{question}}"', doc_to_target='" {{answer}}"',
            generation_kwargs='{until: ["e h", "."], max_gen_toks: 12, do_sample: false}',
            metric_list=f"[{{metric: exact_match, {mean}}}]",
        ),
    }  # fmt: skip


def by_lm_eval(model: Path, tasks: Mapping[str, Path], *, few_shot: int) -> dict[str, Any]:
    """The results of lm-eval's own evaluation by its own model."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from paretron.data.taskfiles import read_task

    lm = HFLM(
        pretrained=load_model(model), tokenizer=load_tokenizer(model), batch_size=3, device="cpu"
    )
    found: dict[str, Any] = simple_evaluate(
        model=lm,
        tasks=[read_task(path) for path in tasks.values()],
        num_fewshot=few_shot,
        bootstrap_iters=10,
        task_manager=TaskManager(include_defaults=False),
    )
    return found


def test_every_way_of_asking_gives_what_lm_evals_own_model_does(
    learned: Path, tasks: dict[str, Path]
) -> None:
    theirs = by_lm_eval(learned, tasks, few_shot=2)
    entries = [{"task": str(path), "few_shot": 2} for path in tasks.values()]
    entries[0]["metric"] = "acc_norm"
    ours = ask(learned, *entries)
    results = theirs["results"]
    accuracy, perplexity, match = (ours.scores[name] for name in tasks)
    assert accuracy.value == pytest.approx(results["choice"]["acc_norm,none"], abs=1e-12)
    assert accuracy.stderr == pytest.approx(results["choice"]["acc_norm_stderr,none"], rel=1e-9)
    assert perplexity.value == pytest.approx(results["rolling"]["word_perplexity,none"], rel=1e-5)
    assert (perplexity.higher_is_better, perplexity.low) == (False, None)
    assert ours.samples["rolling"] == ()  # a document's own is no part of a mean
    assert match.value == pytest.approx(results["written"]["exact_match,none"], abs=1e-12)
    assert [s.few_shot for s in ours.scores.values()] == [2, 2, 2]
    # The texts themselves, not only whether they were right.
    said = [s["filtered_resps"][0] for s in theirs["samples"]["written"]]
    asker = ModelAsker(load_model(learned), load_tokenizer(learned), 7, lambda kind, fields: None)
    prompts = [s["arguments"][0][0] for s in theirs["samples"]["written"]]
    again = asker.generate(
        [asker.tokenizer.encode(text) for text in prompts],
        max_tokens=12, until=["e h", "."], temperature=0.0, top_p=1.0,
    )  # fmt: skip
    assert again == said
    assert len(set(said)) > 3  # else nothing was compared


def test_answers_are_drawn_as_often_as_asked(
    learned: Path, tasks: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, seen = ModelAsker.generate, []

    def noting(self: ModelAsker, prompts: Any, **how: Any) -> list[str]:
        seen.append((len(prompts), how["temperature"], how["top_p"], how["max_tokens"]))
        return generate(self, prompts, **how)

    monkeypatch.setattr(ModelAsker, "generate", noting)
    sampling = {"temperature": 0.7, "top_p": 0.9, "samples": 3}
    entry = {"task": str(tasks["written"]), "limit": 5, "sampling": sampling}
    found = ask(learned, entry)
    assert seen == [(15, 0.7, 0.9, 12)]
    assert found.scores["written"].samples == 5
    assert ask(learned, entry) == found


def test_a_task_that_runs_code_needs_leave(
    learned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    lines = [json.dumps(d) for d in drawn(3, 6)]
    path = write_task(tmp_path, "runs", lines, unsafe_code="true")
    with pytest.raises(ParetronError) as caught:
        ask(learned, str(path))
    assert caught.value.problems[0].code is Code.UNSUPPORTED
    with pytest.raises(ParetronError) as caught:  # as for what a group holds, seen when loaded
        harness.load_tasks(str(path), where="here")
    assert caught.value.problems[0].code is Code.UNSUPPORTED
    assert os.environ["HF_ALLOW_CODE_EVAL"] == "0"
    assert ask(learned, str(path), run_code=True).scores["runs"].samples == 6


def test_a_metric_of_several_figures_is_read_by_its_filter() -> None:
    samples = [
        {"doc_id": k, "filter": name, "pass@1": value, "pass@2": 1.0}
        for name, values in (("create_test", (0.25, 0.75)), ("other", (0.0, 0.0)))
        for k, value in enumerate(values)
    ]
    found = {
        "results": {
            "h": {
                "alias": "h", "pass@1,other": 0.0, "pass@1,create_test": 0.5,
                "pass@1_stderr,create_test": 0.25, "pass@2,create_test": 1.0,
                "pass@2_stderr,create_test": "N/A",
            }
        },
        "samples": {"h": samples[::-1]},
        "n-shot": {"h": 0},
        "higher_is_better": {"h": {"pass_at_k": True}},
    }  # fmt: skip
    one = judged("h", found, metric="pass@1,create_test", where="here")
    assert one == Judged("pass@1,create_test", 0.5, 0.25, (0.25, 0.75), 2, 0, True)
    two = judged("h", found, metric="pass@2", where="here")
    assert (two.metric, two.stderr, two.scores) == ("pass@2,create_test", None, (1.0, 1.0))
    assert judged("h", found, metric=None, where="here").metric == "pass@1,other"


def test_a_limit_asks_the_first_documents(learned: Path) -> None:
    found = ask(learned, {"task": str(TASK), "limit": 10})
    assert found.samples["agreement"] == tuple(directly(learned)[:10])


def test_only_what_is_missing_is_asked_again(
    learned: Path, tasks: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    again: list[bool] = []
    judge = harness.judge

    def counting(name: str, *arguments: Any, **more: Any) -> Judged:
        asked.append(name)
        if asked == ["choice", "written"] and not again:
            raise KeyboardInterrupt
        return judge(name, *arguments, **more)

    monkeypatch.setattr(harness, "judge", counting)
    names, state = [str(tasks["choice"]), str(tasks["written"])], tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        ask(learned, *names, state=state)
    again.append(True)
    events: Events = []
    found = ask(learned, *names, state=state, events=events)
    assert asked == ["choice", "written", "written"]
    told = {f["task"]: f["reused"] for kind, f in events if kind == "task"}
    assert told == {"choice": True, "written": False}
    monkeypatch.setattr(harness, "judge", judge)
    assert found == ask(learned, *names)
    # Another number of examples, another document: asked again, and nothing else is.
    monkeypatch.setattr(harness, "judge", counting)
    asked.clear()
    ask(learned, {"task": names[0], "few_shot": 1}, names[1], state=state)
    assert asked == ["choice"]
    data = tasks["written"].with_suffix(".jsonl")
    data.write_text(data.read_text() + json.dumps(drawn(8, 1)[0]) + "\n")
    ask(learned, names[0], names[1], state=state)
    assert asked == ["choice", "written"]


def test_a_group_is_one_figure_and_goes_on_within(
    learned: Path, tasks: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, judge, asked = harness.load_tasks, harness.judge, []

    def group(task: str, **more: Any) -> tuple[harness.LoadedTask, ...]:
        parts = [load(str(path), **more)[0].leaves for path in (TASK, tasks["choice"])]
        return (harness.LoadedTask("both", {**parts[0], **parts[1]}, "acc"),)

    def stopping(name: str, *arguments: Any, **more: Any) -> Judged:
        asked.append(name)
        if asked == ["agreement", "choice"]:
            raise KeyboardInterrupt
        return judge(name, *arguments, **more)

    monkeypatch.setattr(harness, "load_tasks", group)
    monkeypatch.setattr(harness, "judge", stopping)
    state = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        ask(learned, str(TASK), state=state)
    found = ask(learned, str(TASK), state=state)
    assert asked == ["agreement", "choice", "choice"]
    monkeypatch.setattr(harness, "load_tasks", load)
    single = ask(learned, str(TASK), str(tasks["choice"]))
    assert found.samples["both"] == single.samples["agreement"] + single.samples["choice"]
    assert found.scores["both"].samples == 72 + 24
    assert list(found.scores) == ["both"]


def test_pooling_is_lm_evals() -> None:
    from lm_eval.api.group import Group
    from lm_eval.api.metrics import aggregate_subtask_metrics, mean_stderr, pooled_sample_stderr

    rng = random.Random(2)
    scores = [tuple(float(rng.random() < p) for _ in range(n)) for p, n in ((0.3, 40), (0.8, 25))]
    parts = [Judged("acc", sum(s) / len(s), mean_stderr(s), s, len(s), 5, True) for s in scores]
    found = pooled(parts)
    values, errors, sizes = zip(*[(p.value, p.stderr, p.samples) for p in parts], strict=True)
    assert found.value == pytest.approx(aggregate_subtask_metrics(values, sizes))
    assert found.stderr == pytest.approx(pooled_sample_stderr(errors, sizes))
    assert (found.samples, found.scores) == (65, scores[0] + scores[1])
    for weighted in (True, False):
        group = Group.from_config(
            {"group": "g", "aggregate_metric_list": [{"metric": "acc", "weight_by_size": weighted}]}
        )
        mean = harness.mean_of_group({"groups": {"g": group}}, "g")
        assert mean == ("acc" if weighted else None)


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_a_shares_interval(right: int, total: int, low: float, high: float) -> None:
    assert wilson(right, total) == pytest.approx((low, high), abs=5e-5)


def test_other_intervals_are_of_the_standard_error_or_not_there() -> None:
    judged = Judged("rouge", 0.4, 0.05, (0.3, 0.5), 2, 0, True)
    score = task_score(judged)
    assert (score.low, score.high) == pytest.approx((0.302, 0.498), abs=1e-4)
    assert task_score(Judged("f1", 0.4, None, (), 2, 0, True)).low is None


def test_a_state_of_another_model_is_not_taken(learned: Path, tmp_path: Path) -> None:
    ask(learned, str(TASK), state=tmp_path / "state")
    path = tmp_path / "state/tasks.jsonl"
    head = json.loads(path.read_text().splitlines()[0])["of"]
    assert head["model"] == "a model"
    Journal(path, of=head | {"model": "another"}, start_over=True)
    events: Events = []
    ask(learned, str(TASK), state=tmp_path / "state", events=events)
    assert [f["reused"] for kind, f in events if kind == "task"] == [False]


# what is changed in the choice task, what is asked of it, the code, what is named
REFUSED: dict[str, tuple[dict[str, str], dict[str, Any], Code, str]] = {
    "metric": ({}, {"metric": "f1"}, Code.RECIPE_VALUE, "one of acc, acc_norm"),
    "sampling": ({}, {"sampling": {"temperature": 1}}, Code.RECIPE_VALUE, "multiple_choice"),
    "no-examples": ({"num_fewshot": "0"}, {"few_shot": 3}, Code.RECIPE_VALUE, "no room for 3"),
    "template": ({"doc_to_text": '"{{nothing}}"'}, {}, Code.RECIPE_VALUE, "'nothing' is undefined"),
    "late": ({"doc_to_target": '"{{gold if question else missing}}"'}, {}, Code.RECIPE_VALUE,
             "missing"),
    "no-data": ({"dataset_kwargs": "{data_files: {test: absent.jsonl}}"}, {}, Code.RECIPE_VALUE,
                "absent.jsonl"),
    "empty-answer": (
        {"doc_to_choice": '"{{[question, answer]}}"', "doc_to_text": "x", "doc_to_target": "0"}, {},
        Code.UNSUPPORTED, "0 tokens",
    ),
    "reaches-python": ({"doc_to_text": '"{{ ().__class__.__base__.__subclasses__() }}"'}, {},
                       Code.RECIPE_VALUE, "__class__"),
}  # fmt: skip


@pytest.mark.parametrize("row", REFUSED)
def test_what_cannot_be_asked_is_refused(row: str, learned: Path, tmp_path: Path) -> None:
    changes, entry, code, named = REFUSED[row]
    changes = {"doc_to_text": '"{{question}}"'} | changes
    mean = "aggregation: mean, higher_is_better: true"
    both = f"[{{metric: acc, {mean}}}, {{metric: acc_norm, {mean}}}]"
    lines = [json.dumps(d) for d in drawn(3, 24)]
    path = write_task(tmp_path, "odd", lines, metric_list=both, **changes)
    with pytest.raises(ParetronError) as caught:
        ask(learned, {"task": str(path)} | entry)
    (problem,) = caught.value.problems
    assert problem.code is code
    assert named in f"{problem.cause} {problem.fix}"
    assert "odd" in problem.where


def test_a_model_that_gives_no_number_has_no_accuracy(learned: Path) -> None:
    network = load_model(learned)
    with torch.no_grad():
        network.get_output_embeddings().weight[:] = torch.nan
    asker = ModelAsker(network, load_tokenizer(learned), 5, lambda kind, fields: None)
    with pytest.raises(ParetronError) as caught:
        measure_tasks(
            asker, Evaluate.model_validate({"tasks": [str(TASK)]}), model="x", state=None,
            on_event=lambda kind, fields: None,
        )  # fmt: skip
    assert caught.value.problems[0].code is Code.GATE_NONFINITE
