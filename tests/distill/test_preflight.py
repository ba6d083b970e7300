from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from makers import PicoMaker
from paretron.artifacts.manifest import Provenance
from paretron.artifacts.models import load_model
from paretron.data.store import TokenStore
from paretron.distill import preflight
from paretron.distill.batches import Batch, Windows
from paretron.distill.objective import Objective, Teacher
from paretron.distill.preflight import check_before_training, check_same_tokenizer
from paretron.distill.stage import train
from paretron.errors import Code, ParetronError

Arguments = Callable[..., dict[str, Any]]


@pytest.fixture
def trained(arguments: Arguments) -> Path:
    """A model that has learned a little of the text."""
    given = arguments(steps=40, distil=False, lr=1e-2, min_lr=1e-3)
    train(**given)
    return Path(given["out"])


@pytest.fixture
def batch(tokens: Path) -> Batch:
    return Windows(TokenStore.open(tokens), 32, 320).batch(range(4))


def findings(
    student: Path | Objective, teacher: Teacher | None, batch: Batch, *, untrained: bool = False
) -> list[str]:
    objective = Objective(load_model(student)) if isinstance(student, Path) else student
    try:
        check_before_training(objective, teacher, batch, untrained=untrained)
    except ParetronError as error:
        assert error.exit_code == 5
        assert {p.code for p in error.problems} == {Code.GATE_PREFLIGHT}
        return [f"{p.where}: {p.cause}" for p in error.problems]
    assert all(p.grad is None for p in objective.parameters())
    return []


def test_a_trained_teacher_and_any_student_pass(
    trained: Path, batch: Batch, pico: PicoMaker
) -> None:
    student = pico("llama", name="other", hidden_size=48, num_hidden_layers=2)
    assert findings(student, Teacher(load_model(trained)), batch) == []
    assert findings(trained, None, batch) == []


def test_a_random_teacher_is_refused_unless_told(batch: Batch, pico: PicoMaker) -> None:
    teacher = Teacher(load_model(pico("llama", name="random", num_hidden_layers=2)))
    student = pico("llama", name="other", num_hidden_layers=2)
    (finding, *_) = findings(student, teacher, batch)
    assert "no better than guessing among 320 tokens" in finding
    assert findings(student, teacher, batch, untrained=True) == []


def test_a_zero_teacher_is_refused(trained: Path, batch: Batch) -> None:
    teacher = Teacher(load_model(trained))
    teacher.model.lm_head.weight.zero_()
    assert "guessing" in findings(trained, teacher, batch)[0]


def test_a_teacher_that_expects_what_no_token_stands_for_is_found(
    trained: Path, batch: Batch
) -> None:
    teacher, objective = Teacher(load_model(trained)), Objective(load_model(trained))
    check_before_training(objective, teacher, batch, untrained=False, tokens=320)
    with pytest.raises(ParetronError) as caught:
        check_before_training(objective, teacher, batch, untrained=False, tokens=10)
    assert "310 rows of its vocabulary beyond the 10" in str(caught.value)


def test_labels_that_are_not_shifted_are_found(trained: Path, batch: Batch) -> None:
    unshifted = Batch(batch.input_ids, batch.input_ids, batch.window_ids)
    for teacher in (None, Teacher(load_model(trained))):
        assert any("not shifted" in f for f in findings(trained, teacher, unshifted))


def test_a_teacher_with_dropout_on_differs_from_itself(trained: Path, batch: Batch) -> None:
    teacher = Teacher(load_model(trained))
    for layer in teacher.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
        layer.self_attn.train()
    assert "distance to itself" in findings(trained, teacher, batch)[0]


def test_a_teacher_that_overflows_is_found(trained: Path, batch: Batch) -> None:
    teacher = Teacher(load_model(trained))
    teacher.model.model.norm.weight.fill_(float("nan"))
    assert "distance to itself" in findings(trained, teacher, batch)[0]


def test_a_tensor_that_no_gradient_reaches_is_named(trained: Path, batch: Batch) -> None:
    student = load_model(trained)
    norm = student.model.layers[1].post_attention_layernorm
    forward = norm.forward
    norm.forward = lambda x: forward(x).detach()
    objective = Objective(student)
    found = findings(objective, None, batch, untrained=True)
    assert len(found) == 1
    assert "layers.1.post_attention_layernorm.weight: no gradient reaches it" in found[0]


def test_a_broken_fused_loss_is_found(
    trained: Path, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = preflight.forward_kl
    monkeypatch.setattr(preflight, "forward_kl", lambda *a, **k: 1.01 * plain(*a, **k))
    assert "fused loss" in findings(trained, Teacher(load_model(trained)), batch)[0]


def test_a_real_training_from_a_random_teacher_is_stopped(arguments: Arguments) -> None:
    given = arguments() | {"provenance": Provenance(kind="distill")}
    with pytest.raises(ParetronError) as caught:
        train(**given)
    assert caught.value.problems[0].code is Code.GATE_PREFLIGHT
    assert not given["out"].exists()


def test_other_tokenizers_are_refused_by_their_hashes_before_weights_are_read(
    arguments: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments()
    tokenizer = given["student"] / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    tokenizer.write_text(json.dumps(content))
    monkeypatch.setattr("paretron.distill.stage.load_model", None)
    with pytest.raises(ParetronError) as caught:
        train(**given)
    (problem,) = caught.value.problems
    assert problem.code is Code.INPUT_TOKENIZER
    assert problem.cause.count("sha256") == 2


def test_another_vocabulary_size_is_refused(pico: PicoMaker) -> None:
    small = pico("llama", name="small", vocab_size=300, num_hidden_layers=2)
    large = pico("llama", name="large", vocab_size=320, num_hidden_layers=2)
    with pytest.raises(ParetronError) as caught:
        check_same_tokenizer(small, large)
    assert "vocabulary 300" in str(caught.value)
    assert "vocabulary 320" in str(caught.value)
    check_same_tokenizer(small, small)


def test_the_teacher_is_never_changed(arguments: Arguments) -> None:
    given = arguments()
    teacher = Teacher(load_model(given["teacher"]).train())
    before = {k: v.clone() for k, v in teacher.model.state_dict().items()}
    objective = Objective(load_model(given["student"]))
    ids = torch.arange(60).view(2, 30)
    batch = Batch(ids, ids, (0, 1))
    objective(batch, teacher.predict(batch), 60.0)[0].backward()
    assert not teacher.model.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.model.state_dict().items())
