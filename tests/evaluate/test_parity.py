"""The levels of parity, on arrays: each passes what is equal and sees what is not."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paretron.errors import Code, ParetronError
from paretron.evaluate.parity import (
    BOUNDS,
    EQUAL,
    Bounds,
    Logits,
    Observation,
    ParityReport,
    check_cached,
    check_greedy,
    check_logits,
    check_names,
    check_weights,
    compare,
    observe,
    require,
    seeded_prompts,
)

VOCAB = 50
PROMPTS = ((1,), (4, 9, 2, 7), tuple(range(30)))


class Bag:
    """A toy model: logits depend on the current token and on how often each was seen before."""

    name = "bag"

    def __init__(self, *, noise: float = 0.0, forgets_after: int = 10**9, scale: float = 1.0):
        rng = np.random.default_rng(0)
        self.now = rng.normal(size=(VOCAB, VOCAB)).astype(np.float32) * scale
        self.past = rng.normal(size=(VOCAB, VOCAB)).astype(np.float32) * scale
        self.noise, self.forgets_after = noise, forgets_after

    def start(self) -> Sequence_:
        return Sequence_(self)


class Sequence_:  # noqa: N801
    def __init__(self, bag: Bag):
        self.bag, self.sum, self.calls = bag, np.zeros(VOCAB, np.float32), 0

    def feed(self, ids: Sequence[int]) -> Logits:
        self.calls += 1
        if self.calls > self.bag.forgets_after:
            self.sum = self.sum * np.float32(0.9)
        rows = []
        for token in ids:
            self.sum = self.sum + np.tanh(self.bag.past[token])
            rows.append(self.bag.now[token] + 0.1 * self.sum + np.float32(self.bag.noise))
        return np.stack(rows).astype(np.float32)


def levels(candidate: Bag, bounds: Bounds = BOUNDS["float32"]) -> dict[str, Any]:
    checks = compare(observe(Bag(), PROMPTS), observe(candidate, PROMPTS), bounds=bounds)
    return {c.level: c for c in checks}


def test_the_same_model_is_equal_to_itself() -> None:
    found = levels(Bag(), EQUAL)
    assert all(c.passed for c in found.values())
    assert found["L2"].measured["max_abs"] == 0.0
    assert found["L4"].measured == {"prompts": 3, "steps": 20, "equal": 3, "ties": 0}


def test_logits_that_differ_are_measured_and_located() -> None:
    reference = observe(Bag(), PROMPTS)
    full = [f.copy() for f in reference.full]
    full[1][2, 5] += 0.5
    found = check_logits(reference, replace(reference, full=tuple(full)), bounds=BOUNDS["float32"])
    assert not found.passed
    assert found.measured["max_abs"] == pytest.approx(0.5, rel=1e-5)
    assert found.worst == "prompt 2 of 4 tokens, row 3"
    rows = sum(len(f) for f in reference.full)
    assert found.measured["mean_abs"] == pytest.approx(0.5 / (rows * VOCAB), rel=1e-5)


def test_the_divergence_is_that_of_the_distributions() -> None:
    a, b = np.array([[0.0, 1.0, 2.0]], np.float32), np.array([[1.0, 1.0, 2.5]], np.float32)
    p, q = np.exp(a) / np.exp(a).sum(), np.exp(b) / np.exp(b).sum()
    one = Observation("a", ((1,),), (a,), (a,), ((2,),), (a,))
    other = Observation("b", ((1,),), (b,), (b,), ((2,),), (b,))
    found = check_logits(one, other, bounds=Bounds())
    assert found.measured["kl"] == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-5)
    assert found.measured["top1"] == 1.0
    assert found.measured["spread"] == pytest.approx(float(a.std()), rel=1e-6)


def test_bounds_scale_with_the_spread_of_the_logits_and_never_below_one() -> None:
    for scale, allowed in ((0.01, 1e-4), (20.0, None)):
        observed = observe(Bag(scale=scale), PROMPTS)
        found = check_logits(observed, observed, bounds=BOUNDS["float32"])
        expected = allowed or 1e-4 * found.measured["spread"]
        assert found.bounds["max_abs"] == pytest.approx(expected)
    assert found.measured["spread"] > 10


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_never_passes(value: float) -> None:
    reference = observe(Bag(), PROMPTS)
    full = [f.copy() for f in reference.full]
    full[0][0, 0] = value
    spoilt = replace(reference, full=tuple(full))
    assert not check_logits(reference, spoilt, bounds=Bounds()).passed
    assert not check_logits(spoilt, reference, bounds=Bounds()).passed


def test_another_vocabulary_is_no_match() -> None:
    reference = observe(Bag(), PROMPTS)
    narrow = replace(reference, full=tuple(f[:, :-1] for f in reference.full))
    found = check_logits(reference, narrow, bounds=Bounds())
    assert not found.passed
    assert "(1, 49), not (1, 50)" in found.about


def test_a_cache_that_forgets_is_seen() -> None:
    found = levels(Bag(forgets_after=3))
    assert found["L2"].passed
    assert not found["L3"].passed
    assert found["L3"].worst.startswith("prompt ")


def test_other_tokens_are_seen_and_a_tie_is_no_error() -> None:
    reference = observe(Bag(), PROMPTS)
    step = 7
    first, second = np.argsort(reference.steps[1][step])[::-1][:2]
    tokens = list(reference.greedy[1])
    assert tokens[step] == first
    tokens[step] = int(second)
    other = replace(reference, greedy=(reference.greedy[0], tuple(tokens), reference.greedy[2]))
    gap = float(reference.steps[1][step][first] - reference.steps[1][step][second])
    wrong = check_greedy(reference, other, bounds=BOUNDS["float32"], error=gap / 2.1)
    assert not wrong.passed
    assert wrong.worst == "prompt 2 of 4 tokens, token 8"
    tie = check_greedy(reference, other, bounds=BOUNDS["float32"], error=gap / 1.9)
    assert tie.passed
    assert tie.measured == {"prompts": 3, "steps": 20, "equal": 2, "ties": 1}
    assert check_greedy(reference, other, bounds=BOUNDS["bfloat16"], error=0.0).passed
    assert check_cached(other).passed


def test_names_and_shapes() -> None:
    expected = {"a": (2, 3), "b": (4,)}
    assert check_names(expected, dict(expected)).passed
    assert not check_names({}, {}).passed
    for found, worst in (
        ({"a": (2, 3)}, "b"),
        ({"a": (3, 2), "b": (4,)}, "a"),
        ({"a": (2, 3), "b": (4,), "c": (1,)}, "c"),
    ):
        check = check_names(expected, found)
        assert (check.passed, check.worst) == (False, worst)


def test_the_worst_tensor_is_named() -> None:
    base = torch.arange(6.0).view(2, 3)
    pairs = [("a", base, base + 1e-3), ("b", base, base - 1e-2), ("c", base, base)]
    found = check_weights(pairs, bound=0.0)
    assert (found.passed, found.worst) == (False, "b")
    assert found.measured["different"] == 2
    assert found.measured["max_abs"] == pytest.approx(1e-2, rel=1e-4)
    assert check_weights(pairs, bound=0.1).passed


@pytest.mark.parametrize(
    "found", [torch.tensor([1.0, math.nan]), torch.tensor([1.0, math.inf]), torch.ones(3)]
)
def test_a_weight_that_is_no_match_never_passes(found: torch.Tensor) -> None:
    check = check_weights([("w", torch.ones(2), found)], bound=1e9)
    assert (check.passed, check.worst) == (False, "w")
    assert not check_weights([], bound=1.0).passed


def test_a_large_tensor_is_compared_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paretron.evaluate.parity._CHUNK", 100)
    a = torch.zeros(1001)
    b = a.clone()
    b[-1] = 1.0
    assert check_weights([("w", a, b)], bound=0.0).measured["max_abs"] == 1.0


def test_a_report_says_what_failed_and_where() -> None:
    weights = check_weights([("w", torch.ones(2), torch.ones(2) + 1)], bound=0.0)
    names = check_names({"w": (2,)}, {"w": (2,)})
    report = ParityReport("source", "export", (names, weights))
    assert not report.passed
    with pytest.raises(ParetronError) as caught:
        require(report)
    (problem,) = caught.value.problems
    assert (problem.code, problem.code.exit, problem.where) == (Code.GATE_PARITY, 5, "w")
    assert "max_abs 1 (allowed: max_abs 0)" in problem.cause
    require(ParityReport("source", "export", (names,)))
    with pytest.raises(ParetronError):
        require(ParityReport("source", "export", ()))


def test_json_has_no_infinity() -> None:
    weights = check_weights([("w", torch.ones(2), torch.ones(3))], bound=0.0)
    content = ParityReport("a", "b", (weights,)).as_json()
    assert content["checks"][0]["measured"] == {"tensors": 1, "different": 1, "max_abs": None}
    assert content["passed"] is False


@given(
    vocab=st.integers(1, 200_000),
    context=st.integers(1, 10_000),
    window=st.none() | st.integers(1, 10_000),
)
def test_prompts_fit_any_config(vocab: int, context: int, window: int | None) -> None:
    config = {"vocab_size": vocab, "max_position_embeddings": context, "sliding_window": window}
    prompts = seeded_prompts(config)
    assert prompts == seeded_prompts(config)
    assert len(prompts) == 4
    assert all(0 <= t < vocab for p in prompts for t in p)
    longest = max(map(len, prompts))
    assert 1 <= longest <= max(1, context - 20)
    assert longest <= 1024 + 32
    if window and window < 1000 and context > window + 60:
        assert longest > window


def test_other_seeds_are_other_prompts() -> None:
    config = {"vocab_size": 1000}
    assert seeded_prompts(config, seed=1) != seeded_prompts(config)


def test_it_is_light_to_import() -> None:
    import subprocess

    code = "import sys, paretron.evaluate.parity; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
