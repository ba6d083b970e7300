"""Is an export the same model? Five levels, measured on plain arrays, and the report on them.

L0 names and shapes, L1 weights, L2 logits of fixed prompts, L3 cached decoding against one full
forward pass, L4 greedy tokens. An engine takes part through one small protocol: start a sequence,
feed it tokens, get their logits. Reference and candidate are observed one after the other, so
that both never have to be in memory at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from paretron.errors import Code, ParetronError, Problem

if TYPE_CHECKING:
    import torch

Logits = npt.NDArray[np.float32]
Prompt = tuple[int, ...]

GREEDY_STEPS = 20
_DECODED = 16  # positions that are decoded one by one for L3
_LONGEST = 192  # tokens of the longest prompt
_LONG_WINDOW = 1024  # attention windows from here on are too long to reach beyond
_CHUNK = 1 << 24  # elements compared at a time


class Session(Protocol):
    """One sequence in an engine, with its key-value cache."""

    def feed(self, ids: Sequence[int]) -> Logits:
        """Append tokens and return the logits of exactly those, (len(ids), vocab)."""


class Engine(Protocol):
    """Something that runs a model."""

    @property
    def name(self) -> str:
        """What runs the model, and in which dtype."""

    def start(self) -> Session:
        """An empty sequence."""


@dataclass(frozen=True)
class Bounds:
    """The largest differences that pass; `same_tokens` asks for equal greedy tokens too.

    max_abs and mean_abs hold for logits whose spread (standard deviation over the vocabulary) is
    at most 1; rounding grows with the numbers, so a larger spread scales them.
    """

    max_abs: float = math.inf
    mean_abs: float = math.inf
    kl: float = math.inf
    same_tokens: bool = False


EQUAL = Bounds(max_abs=0.0, same_tokens=True)
# By the dtype of the exported weights. Rounding weights to 16 bits moves single logits of a model
# by several times their mean difference, more with depth and vocabulary: there the mean and the
# divergence are bounded.
BOUNDS: Mapping[str, Bounds] = {
    "float32": Bounds(max_abs=1e-4, same_tokens=True),
    "bfloat16": Bounds(mean_abs=5e-2, kl=1e-2),
    "float16": Bounds(mean_abs=5e-2, kl=1e-2),
}


@dataclass(frozen=True)
class Check:
    """One level's outcome: what was measured, what was allowed, and the worst tensor or prompt."""

    level: str
    about: str
    passed: bool
    measured: Mapping[str, float]
    bounds: Mapping[str, float]
    worst: str = ""

    def as_json(self) -> dict[str, Any]:
        """The JSON form; a number that is not finite becomes null."""
        return {
            "level": self.level,
            "about": self.about,
            "passed": self.passed,
            "measured": {k: _json_number(v) for k, v in self.measured.items()},
            "bounds": {k: _json_number(v) for k, v in self.bounds.items()},
            "worst": self.worst,
        }


@dataclass(frozen=True)
class ParityReport:
    """What was compared, on which levels, and what came out."""

    reference: str
    candidate: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every level that ran passed, and at least one ran."""
        return bool(self.checks) and all(c.passed for c in self.checks)

    def as_json(self) -> dict[str, Any]:
        """The content of an artifact's parity.json."""
        return {
            "schema": 1,
            "reference": self.reference,
            "candidate": self.candidate,
            "passed": self.passed,
            "checks": [c.as_json() for c in self.checks],
        }


def require(report: ParityReport) -> None:
    """Raise GATE_PARITY with one problem for each failed level, naming its worst tensor."""
    failed = [c for c in report.checks if not c.passed]
    if not failed and not report.passed:
        raise ParetronError(Problem(Code.GATE_PARITY, "no level was checked"))
    problems = [
        Problem(
            Code.GATE_PARITY,
            f"{c.level} {c.about}: {report.candidate} differs from {report.reference}: "
            + ", ".join(f"{k} {v:.3g}" for k, v in c.measured.items())
            + "".join(f" (allowed: {k} {v:.3g})" for k, v in c.bounds.items()),
            where=c.worst,
            fix="nothing was published; `paretron inspect` the source, then export again",
        )
        for c in failed
    ]
    if problems:
        raise ParetronError(*problems)


# ---- L0 and L1: what is in the files


def check_names(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> Check:
    """L0: every tensor is there in its shape, and nothing else is."""
    missing = [n for n in expected if n not in found]
    unexpected = [n for n in found if n not in expected]
    shapes = [n for n, s in expected.items() if n in found and tuple(found[n]) != tuple(s)]
    wrong = [*missing, *shapes, *unexpected]
    return Check(
        "L0",
        "names and shapes",
        not wrong and bool(expected),
        {
            "tensors": len(expected),
            "missing": len(missing),
            "unexpected": len(unexpected),
            "other_shape": len(shapes),
        },
        {},
        worst=wrong[0] if wrong else "",
    )


def check_weights(
    pairs: Iterable[tuple[str, torch.Tensor, torch.Tensor]], *, bound: float, about: str = "weights"
) -> Check:
    """L1: (name, expected, found) tensors of equal shape differ by at most `bound`, absolutely.

    Pairs are read one at a time, and those of one name in a row are parts of one tensor. The
    tensor with the largest difference is named.
    """
    differences: dict[str, float] = {}
    for name, expected, found in pairs:
        before = differences.get(name, 0.0)
        differences[name] = max(before, largest_difference(expected, found))
    return weights_check(differences, bound=bound, about=about)


def weights_check(
    differences: Mapping[str, float], *, bound: float, about: str = "weights"
) -> Check:
    """L1 from the largest absolute difference of each tensor."""
    worst = max(differences, key=lambda name: differences[name], default="")
    largest = differences.get(worst, 0.0)
    different = sum(difference > bound for difference in differences.values())
    return Check(
        "L1",
        about,
        bool(differences) and largest <= bound,
        {"tensors": len(differences), "different": different, "max_abs": largest},
        {"max_abs": bound},
        worst=worst if largest else "",
    )


def largest_difference(expected: torch.Tensor, found: torch.Tensor) -> float:
    """The largest absolute difference of two tensors; infinite for NaN or another shape."""
    if expected.shape != found.shape:
        return math.inf
    largest = 0.0
    flat = zip(expected.reshape(-1).split(_CHUNK), found.reshape(-1).split(_CHUNK), strict=True)
    for a, b in flat:
        if a.numel() and not (a.dtype == b.dtype and a.equal(b)):
            difference = float((a.double() - b.double()).abs().max())
            largest = max(largest, math.inf if math.isnan(difference) else difference)
    return largest


# ---- L2 to L4: what an engine computes


@dataclass(frozen=True)
class Observation:
    """What an engine gave for every prompt.

    `full` (T, vocab) from one forward pass, `cached` (T', vocab) of the last T' positions decoded
    one by one behind a cached prefill, `greedy` tokens, and `steps` (len(greedy), vocab), the
    logits that each of them was chosen from.
    """

    engine: str
    prompts: tuple[Prompt, ...]
    full: tuple[Logits, ...]
    cached: tuple[Logits, ...]
    greedy: tuple[Prompt, ...]
    steps: tuple[Logits, ...]


def seeded_prompts(config: Mapping[str, Any], *, seed: int = 0) -> tuple[Prompt, ...]:
    """Four prompts of random tokens for a config.json, the same every time.

    They leave room to decode in the context, and the last reaches beyond a short attention window.
    """
    rng = np.random.default_rng(seed)
    room = max(1, int(config.get("max_position_embeddings") or 2048) - GREEDY_STEPS)
    window = int(config.get("sliding_window") or 0)
    longest = window + 2 * _DECODED if 0 < window < _LONG_WINDOW else _LONGEST
    lengths = (min(n, room) for n in (1, 17, 64, max(_LONGEST, longest)))
    return tuple(tuple(rng.integers(0, config["vocab_size"], n).tolist()) for n in lengths)


def observe(engine: Engine, prompts: Sequence[Prompt], *, steps: int = GREEDY_STEPS) -> Observation:
    """Run an engine on every prompt: all at once, with its cache, and greedily."""
    full, cached, greedy, greedy_steps = [], [], [], []
    for prompt in prompts:
        full.append(engine.start().feed(prompt))
        head = max(1, len(prompt) - _DECODED)
        session = engine.start()
        rows = [session.feed(prompt[:head])[-1:]]
        rows += [session.feed([token]) for token in prompt[head:]]
        cached.append(np.concatenate(rows))
        tokens, chosen_from = [], []
        for _ in range(steps):
            chosen_from.append(rows[-1][-1])
            tokens.append(int(chosen_from[-1].argmax()))
            rows.append(session.feed(tokens[-1:]))
        greedy.append(tuple(tokens))
        greedy_steps.append(np.stack(chosen_from))
    return Observation(
        engine.name, tuple(prompts), tuple(full), tuple(cached), tuple(greedy), tuple(greedy_steps)
    )


def check_logits(reference: Observation, candidate: Observation, *, bounds: Bounds) -> Check:
    """L2: logits of one forward pass; KL(reference || candidate) in nats, mean over positions."""
    return _check_rows("L2", "logits", reference.prompts, reference.full, candidate.full, bounds)


def check_cached(candidate: Observation, *, bounds: Bounds = BOUNDS["float32"]) -> Check:
    """L3: an engine's cached decoding gives what its own full forward pass gives."""
    tails = tuple(f[-len(c) :] for f, c in zip(candidate.full, candidate.cached, strict=True))
    return _check_rows(
        "L3", "cached decode against full forward", candidate.prompts, tails, candidate.cached,
        bounds,
    )  # fmt: skip


def check_greedy(
    reference: Observation, candidate: Observation, *, bounds: Bounds, error: float
) -> Check:
    """L4: the same greedy tokens.

    Where the reference's own two logits are closer than twice `error`, the measured difference of
    the logits, either token is right: such a tie ends the comparison of its prompt and is counted.
    """
    equal = ties = 0
    worst = ""
    for k, (a, b) in enumerate(zip(reference.greedy, candidate.greedy, strict=True)):
        step = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
        if step is None:
            equal += 1
            continue
        logits = reference.steps[k][step]
        if logits[a[step]] - logits[b[step]] <= 2 * error:
            ties += 1
        else:
            worst = worst or f"{_prompt(reference.prompts, k)}, token {step + 1}"
    total = len(reference.prompts)
    return Check(
        "L4",
        "greedy tokens",
        equal + ties == total or not bounds.same_tokens,
        {"prompts": total, "steps": len(reference.greedy[0]), "equal": equal, "ties": ties},
        {},
        worst=worst,
    )


def compare(
    reference: Observation, candidate: Observation, *, bounds: Bounds
) -> tuple[Check, Check, Check]:
    """L2, L3 and L4 of two observations of the same prompts."""
    logits = check_logits(reference, candidate, bounds=bounds)
    error = logits.measured["max_abs"]
    return (
        logits,
        check_cached(candidate),
        check_greedy(reference, candidate, bounds=bounds, error=error),
    )


def _check_rows(
    level: str,
    about: str,
    prompts: Sequence[Prompt],
    reference: Sequence[Logits],
    candidate: Sequence[Logits],
    bounds: Bounds,
) -> Check:
    """Compare logits (T, vocab) prompt by prompt."""
    largest, worst = -1.0, ""
    total = squares = kl = 0.0
    elements = same = rows = 0
    for k, (a, b) in enumerate(zip(reference, candidate, strict=True)):
        if a.shape != b.shape:
            cause = f"logits of shape {b.shape}, not {a.shape}"
            return Check(level, cause, False, {}, {}, worst=_prompt(prompts, k))
        difference = np.nan_to_num(np.abs(a.astype(np.float64) - b), nan=math.inf)
        if difference.max() > largest:
            largest = float(difference.max())
            position = int(difference.max(axis=1).argmax())
            worst = f"{_prompt(prompts, k)}, row {position + 1}"
        total += float(difference.sum())
        with np.errstate(invalid="ignore"):
            squares += float(a.var(axis=1, dtype=np.float64).sum())
        elements += difference.size
        kl += float(_kl(a, b).sum())
        same += int((a.argmax(axis=1) == b.argmax(axis=1)).sum())
        rows += len(a)
    measured = {
        "max_abs": largest,
        "mean_abs": total / elements,
        "kl": math.inf if math.isnan(kl) else kl / rows,
        "top1": same / rows,
        "spread": math.sqrt(squares / rows),
    }
    scale = max(1.0, measured["spread"])
    limits = (
        ("max_abs", bounds.max_abs * scale),
        ("mean_abs", bounds.mean_abs * scale),
        ("kl", bounds.kl),
    )
    allowed = {k: v for k, v in limits if v < math.inf}
    finite = all(map(math.isfinite, measured.values()))
    passed = finite and all(measured[k] <= v for k, v in allowed.items())
    return Check(level, about, passed, measured, allowed, worst="" if largest == 0.0 else worst)


def _kl(a: Logits, b: Logits) -> npt.NDArray[np.float64]:
    """KL(softmax a || softmax b) of every row, in nats."""
    with np.errstate(invalid="ignore", over="ignore"):
        log_p, log_q = _log_softmax(a), _log_softmax(b)
        result: npt.NDArray[np.float64] = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    return result


def _log_softmax(x: Logits) -> npt.NDArray[np.float64]:
    wide = x.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    result: npt.NDArray[np.float64] = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return result


def _prompt(prompts: Sequence[Prompt], k: int) -> str:
    return f"prompt {k + 1} of {len(prompts[k])} tokens"


def _json_number(value: float) -> float | int | None:
    """Three digits: the rest is noise of thread counts."""
    if isinstance(value, int):
        return value
    return float(f"{value:.3g}") if math.isfinite(value) else None
