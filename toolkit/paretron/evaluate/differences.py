"""How far a student is from its teacher, by what both were judged on: paired differences.

What is hard for one model is hard for the other, so the differences of the two on the same window,
document or question spread far less than the values themselves: the interval of their mean says
what two separate intervals, overlapping, leave open.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from paretron.artifacts.jsonfile import parse_object, read_object
from paretron.errors import Code, ParetronError, Problem
from paretron.evaluate.intervals import paired_shares, ratio_interval
from paretron.evaluate.stage import EVALUATION, WINDOWS
from paretron.evaluate.tasks import SAMPLES, file_name

_MAX_BYTES = 1 << 30  # a line for each of millions of documents


def differences(teacher: Path, student: Path) -> dict[str, dict[str, Any]]:
    """Student minus teacher of two evaluations' folders, by "loss.TEXT" and "task.NAME".

    Each holds `value` (nats a token; of a task its own score), `low` and `high` of its 95 %
    interval (None from one pair alone) and `pairs`. A text is compared where both read the same
    tokens cut alike, a task where both were asked alike and answered as many documents; what cannot
    be paired is left out. Errors: INPUT_FILE for a folder that holds no evaluation, INPUT_MANIFEST
    for a broken one.
    """
    try:
        return dict((*_texts(teacher, student), *_tasks(teacher, student)))
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ParetronError(
            Problem(
                Code.INPUT_MANIFEST,
                f"not what an evaluation holds: {type(error).__name__}: {error}",
                where=f"{teacher}, {student}",
                fix="evaluate both again with `paretron eval`",
            )
        ) from error


def _texts(teacher: Path, student: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    one, other = (_read(folder, WINDOWS)["texts"] for folder in (teacher, student))
    for name in sorted(one.keys() & other.keys()):
        before, after = one[name], other[name]
        if before["text"] == after["text"] and before["tokens"] == after["tokens"]:
            apart = [b - a for a, b in zip(before["nats"], after["nats"], strict=True)]
            yield f"loss.{name}", _paired(apart, before["tokens"])


def _tasks(teacher: Path, student: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    one, other = (_read(folder, EVALUATION)["tasks"] for folder in (teacher, student))
    for name in sorted(one.keys() & other.keys()):
        if any(one[name].get(key) != other[name].get(key) for key in ("metric", "few_shot")):
            continue
        before, after = _answers(teacher, name), _answers(student, name)
        if before and before.keys() == after.keys():
            yield f"task.{name}", _scored([(s, after[doc]) for doc, s in before.items()])


def _answers(folder: Path, task: str) -> dict[Any, float]:
    """The score of each document that a task's samples name; none where there are no samples."""
    path = folder / SAMPLES / f"{file_name(task)}.jsonl"
    if not path.is_file():
        return {}
    with path.open("rb") as lines:
        samples = [parse_object(line, where=str(path), code=Code.INPUT_MANIFEST) for line in lines]
    return {sample["doc"]: float(sample["score"]) for sample in samples}


def _read(folder: Path, name: str) -> dict[str, Any]:
    return read_object(folder / name, code=Code.INPUT_MANIFEST, max_bytes=_MAX_BYTES)


def _scored(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Of a share of documents by its counts, of any other score by the spread of differences."""
    found = _paired([after - before for before, after in pairs], [1] * len(pairs))
    if len(pairs) > 1 and {score for pair in pairs for score in pair} <= {0.0, 1.0}:
        gained, lost = (pairs.count(pair) for pair in ((0.0, 1.0), (1.0, 0.0)))
        found["low"], found["high"] = paired_shares(gained, lost, len(pairs))
    return found


def _paired(apart: Sequence[float], sizes: Sequence[int]) -> dict[str, Any]:
    value, low, high = ratio_interval(apart, sizes)
    return {"value": value, "low": low, "high": high, "pairs": len(apart)}
