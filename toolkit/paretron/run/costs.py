"""What a run took so far, read from its events; and what the family of its models costs to train.

The family's cost is that of the first Minitron paper (section 4.1): every member trained from
scratch on as many tokens as the largest, against the largest so and the others distilled from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paretron.plan.cost import ModelFacts
from paretron.plan.plan import Plan
from paretron.plan.stages import REPORT, TEACHER

EVENTS = "events.jsonl"
# Tokens of a member trained from scratch, for each one distilled (the paper's ratio).
TOKENS_SAVED = 40
_PASSES = 3  # a backward pass costs two forward passes


@dataclass
class _Stage:
    """The events of a stage, added up over its attempts."""

    seconds: float = 0.0
    tokens: int = 0
    trains: bool = False
    began: float | None = None  # of the attempt under way
    last: float = 0.0
    step: tuple[int, int] | None = None  # (step, tokens) before

    def take(self, event: Mapping[str, Any]) -> None:
        """One event, in the order of the log."""
        kind, time = event["kind"], float(event["time"])
        if kind == "started":
            self.close()
            self.began = time
        self.last = time
        if kind in ("finished", "failed"):
            self.close()
        elif kind == "step":
            self._step(int(event["step"]), int(event["tokens"]))

    def close(self) -> None:
        """An attempt is over; one that was killed lasted until its last event."""
        if self.began is not None:
            self.seconds += max(0.0, self.last - self.began)
        self.began = None

    def _step(self, step: int, tokens: int) -> None:
        """The tokens of a step: since the one before, or, of a resumed training's first, a mean."""
        follows = self.step is not None and step == self.step[0] + 1
        self.tokens += tokens - self.step[1] if follows and self.step else tokens // max(1, step)
        self.trains, self.step = True, (step, tokens)


def stage_costs(events: Path, plan: Plan) -> list[dict[str, Any]]:
    """Seconds and tokens of every stage that ran, all attempts together, in the plan's order."""
    found: dict[str, _Stage] = {}
    for event in _lines(events):
        found.setdefault(event["stage"], _Stage()).take(event)
    devices = _devices(plan)
    out = []
    for stage in plan.stages:
        spent = found.get(stage.name)
        if spent is None or stage.name == REPORT:
            continue
        spent.close()
        if spent.seconds > 0:
            out.append(
                {
                    "stage": stage.name,
                    "kind": stage.kind,
                    "seconds": round(spent.seconds, 3),
                    "devices": devices.get(stage.kind, 1),
                    "tokens": spent.tokens if spent.trains else None,
                }
            )
    return out


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a log; a line that a kill cut short is none."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and {"time", "stage", "kind"} <= set(event):
                yield event


def _devices(plan: Plan) -> dict[str, int]:
    """How many devices the stages of a kind take at once; the processes of a CPU are one device."""
    if not plan.hardware.is_gpu:
        return {}
    recipe = plan.recipe
    distill = recipe.distill.processes
    correct = recipe.correct.processes if recipe.correct else 1
    return {"distill": distill, "capture": distill, "trial": distill, "correct": correct}


def run_cost(events: Path, *, plan: Plan, facts: Mapping[str, ModelFacts]) -> dict[str, Any]:
    """The `cost` of a report; `facts` are those of the teacher and of every student."""
    return {
        "device": "GPU" if plan.hardware.is_gpu else "CPU",
        "stages": stage_costs(events, plan),
        "family": family_cost(plan, facts),
    }


def family_cost(plan: Plan, facts: Mapping[str, ModelFacts]) -> dict[str, Any] | None:
    """The cost of the whole family by the paper's count; None where there is no student."""
    recipe = plan.recipe
    distilled = float(recipe.distill.tokens)
    if not recipe.students:
        return None
    pretrain = recipe.teacher.pretrain
    if pretrain is not None:
        scratch = float(pretrain.tokens)
        basis = "from scratch every member would see the tokens that the teacher was trained on"
    else:
        scratch = TOKENS_SAVED * distilled
        basis = (
            f"assumed, as the paper found: a member from scratch needs {TOKENS_SAVED} times the "
            "tokens that a distilled one does; what this teacher was trained on is not known"
        )
    seq_len = recipe.data.train.seq_len
    each = {n: _PASSES * f.forward_flops(tokens=1, seq_len=seq_len) for n, f in facts.items()}
    tokens = {name: scratch if name == TEACHER else distilled for name in facts}
    others = sum(e.flops for name, e in plan.estimates.items() if name != TEACHER)
    return {
        "basis": basis,
        "members": [
            {
                "model": name,
                "flops_per_token": flops,
                "scratch_tokens": scratch,
                "tokens": tokens[name],
            }
            for name, flops in each.items()
        ],
        "scratch_flops": sum(each.values()) * scratch,
        "flops": sum(flops * tokens[name] for name, flops in each.items()),
        "all_flops": each[TEACHER] * scratch + others,
    }
