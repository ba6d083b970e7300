"""A run that was stopped goes on with another length of training windows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from paretron.errors import Code, ParetronError
from paretron.plan.plan import Plan, make_plan
from paretron.recipe import load_recipe
from paretron.run.runner import run_plan
from paretron.run.stages import STAGES
from picorun import RECIPE, events, write_pico_recipe


class Stopped(Exception):
    """A run that was told to go no further."""


def test_a_training_under_way_goes_on_and_a_finished_one_is_refused(tmp_path: Path) -> None:
    distill = RECIPE["distill"] | {"checkpoint_every": 1}
    recipe = write_pico_recipe(
        tmp_path, correct=None, students={"width": {"hidden": 48}}, distill=distill,
        export=[{"to": "hf"}], profile=None,
    )  # fmt: skip
    out = tmp_path / "run"

    def planned(seq_len: int) -> Plan:
        overrides = [f"data.train.seq_len={seq_len}"]
        return make_plan(load_recipe(recipe, overrides=overrides), out=out, offline=True)

    def stop(stage: str, kind: str, fields: Mapping[str, Any]) -> None:
        if kind == "step" and fields["step"] == 4:
            raise Stopped

    with pytest.raises(Stopped):
        run_plan(planned(32), out, stages=STAGES, offline=True, watcher=stop)
    before = len(events(out))
    run_plan(planned(64), out, stages=STAGES, offline=True)
    now = events(out)[before:]
    made = {event["stage"]: event["kind"] for event in now}
    assert made["data"] == made["score"] == made["width.prune"] == "reused"
    assert any("windows of 64 tokens, 32 before" in str(event.get("message")) for event in now)
    metrics = json.loads((out / "stages/width.distill/metrics.json").read_text())
    lengths = [step["seq_len"] for step in metrics["train"]]
    assert set(lengths) == {32, 64}
    assert lengths == sorted(lengths)
    with pytest.raises(ParetronError) as refused:
        run_plan(planned(32), out, stages=STAGES, offline=True)
    assert {problem.code for problem in refused.value.problems} == {Code.RUN_MISMATCH}
    (said,) = {p.cause for p in refused.value.problems if "width.distill" in str(p.where)}
    assert "settings.train.seq_len: 64 -> 32" in said
