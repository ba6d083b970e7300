"""Measurements beside their bounds: shares attained, predicted ratios, and what has no bound."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from paretron_profiling.compare import SAME_BATCH, SAME_MEMORY, speedups
from paretron_profiling.models import ModelUnderTest
from paretron_profiling.roofline.bounds import (
    Costs,
    Formats,
    decode_bound,
    mean_context,
)
from paretron_profiling.roofline.devices import Device
from paretron_profiling.roofline.predict import (
    Load,
    predict,
)
from paretron_profiling.roofline.rows import roofline_json
from paretron_profiling.schema import CLOSED, OPEN, Measurement, Sample, Workload

CPU = Device(
    "a CPU", "cpu", 1e10, {"float32": 1e11, "bfloat16": 5e10}, launch_s=1e-6, measured=True,
    bandwidths=((1 << 20, 5e10), (1 << 26, 2e10), (1 << 29, 1e10)),
)  # fmt: skip
ABOUT = {"transformers": {"device": "cpu", "dtype": "float32", "mode": "eager"},
         "ortgenai": {"device": "cpu"}}  # fmt: skip
ENGINES = ("transformers", "ortgenai")


def costs_of(model: ModelUnderTest) -> Costs:
    config = json.loads((model.folders["hf"] / "config.json").read_text())
    return Costs.of(config, formats=Formats.of("float32"))


def twice_the_bound(model: ModelUnderTest, work: Workload) -> Measurement:
    """What an engine would measure that attains exactly half."""
    load = Load(int(work.load), work.input_len, work.output_len)
    made = predict(model.name, costs_of(model), CPU, load=load)
    steps = range(work.output_len)
    times = [2 * (made.prefill.bound_s + k * made.decode.bound_s) for k in steps]
    tokens = [[0] * work.output_len] * load.batch
    return Measurement.of(work, samples=[Sample.in_lockstep(times, tokens=tokens)], warmup=1)


def test_rows_stand_beside_what_was_measured(models: list[ModelUnderTest]) -> None:
    works = [Workload.at_once("transformers", n, 16, 9) for n in (1, 4)]
    measured = {m.name: [twice_the_bound(m, w) for w in works] for m in models}
    ratios = speedups(measured, models=models)
    found = roofline_json(models, measured, speedups=ratios, device=CPU, about=ABOUT)
    json.dumps(found, allow_nan=False)
    assert len(found["rows"]) == 3 * 2 * 2
    for row in found["rows"]:
        assert row["attained"] == pytest.approx(0.5)
        parts = row["parts"]
        memory = parts["weights_s"] + parts["kv_s"]
        assert row["bound_s"] == pytest.approx(max(memory, parts["compute_s"]))
        assert row["with_launch_s"] == pytest.approx(row["bound_s"] + parts["launch_s"])
    assert {(s["rule"], s["load"]) for s in found["speedup"]} >= {(SAME_BATCH, 1), (SAME_BATCH, 4)}
    assert SAME_MEMORY in {s.rule for s in ratios} or len(found["speedup"]) == len(ratios)
    depth = [s["predicted"] for s in found["speedup"] if s["model"] == "depth"]
    assert all(1 < ratio < 2 for ratio in depth)
    # Twice the bound is the bound more: a line through layers and what they take beyond.
    for line in found["overheads"]:
        assert line["models"] == 3
        steps = [r for r in found["rows"] if r["phase"] == "decode" and r["load"] == line["load"]]
        beyond = {r["model"]: r["measured_s"] - r["bound_s"] for r in steps}
        layered = line["outside_s"] + 4 * line["per_layer_s"]
        assert layered == pytest.approx((beyond["teacher"] + beyond["width"]) / 2)
        assert line["outside_s"] + 2 * line["per_layer_s"] == pytest.approx(beyond["depth"])
        assert line["unexplained_s"] == pytest.approx((beyond["teacher"] - beyond["width"]) / 2)
    assert [line["load"] for line in found["overheads"]] == [1, 4]
    assert found["launches"].keys() == {"transformers", "ortgenai"}


def test_an_onnx_folder_is_weighed(models: list[ModelUnderTest], tmp_path: Path) -> None:
    teacher = models[0]
    work = Workload.at_once("ortgenai", 2, 16, 9)
    rows = {}
    for engine in ENGINES:
        same = replace(work, engine=engine)
        measured = {teacher.name: [twice_the_bound(teacher, same)]}
        found = roofline_json([teacher], measured, speedups=(), device=CPU, about=ABOUT)
        rows[engine] = found["rows"][1]["parts"]
    # fp32 in both forms; the folder also holds the graph.
    assert rows["ortgenai"]["weights_s"] == pytest.approx(
        rows["transformers"]["weights_s"], rel=0.2
    )
    assert rows["ortgenai"]["kv_s"] == rows["transformers"]["kv_s"]


def test_a_closed_loop_has_rows_and_an_open_one_a_note(models: list[ModelUnderTest]) -> None:
    teacher = models[0]
    closed, opened = (Workload("transformers", mode, 4, 16, 9) for mode in (CLOSED, OPEN))
    sample = Sample((0.0, 0.0), (0.01, 0.01), (0.09, 0.09), (0.01,) * 16)
    measured = {
        teacher.name: [Measurement.of(w, samples=[sample], warmup=1) for w in (closed, opened)]
    }
    found = roofline_json([teacher], measured, speedups=(), device=CPU, about=ABOUT)
    assert [(r["mode"], r["phase"]) for r in found["rows"]] == [
        (CLOSED, "prefill"), (CLOSED, "decode"),
    ]  # fmt: skip
    assert [r["measured_s"] for r in found["rows"]] == pytest.approx([0.01, 0.01])
    one = predict("", costs_of(teacher), CPU, load=Load(1, 16, 9)).prefill.bound_s
    four = predict("", costs_of(teacher), CPU, load=Load(4, 16, 9)).decode.bound_s
    assert [r["bound_s"] for r in found["rows"]] == pytest.approx([one, four])
    assert any("open loops" in note for note in found["notes"])


@pytest.mark.parametrize("about", [{}, {"device": "cuda:0"}, {"url": "http://far/v1"}])
def test_an_engine_elsewhere_has_no_bound(
    about: dict[str, str], models: list[ModelUnderTest]
) -> None:
    teacher = models[0]
    measured = {
        teacher.name: [twice_the_bound(teacher, Workload.at_once("transformers", 1, 16, 9))]
    }
    found = roofline_json(
        [teacher], measured, speedups=(), device=CPU, about={"transformers": about}
    )
    assert found["rows"] == []
    assert any("transformers" in note for note in found["notes"])
    assert found["launches"] == {}


@pytest.mark.parametrize(
    ("about", "quantised", "weights", "cache"),
    [
        ({"dtype": "bfloat16"}, False, 1 / 2, 1 / 2),
        ({"dtype": "bfloat16", "weights": "fp8"}, False, None, 1 / 2),
        ({"dtype": "bfloat16"}, True, 1.0, 1 / 2),  # of the bytes that lie there, whatever they are
        ({"dtype": "auto"}, False, 1.0, 1.0),
    ],
)
def test_weights_count_as_they_are_held(
    about: dict[str, str], quantised: bool, weights: float | None, cache: float,
    models: list[ModelUnderTest], tmp_path: Path,
) -> None:  # fmt: skip
    folder = shutil.copytree(models[0].folders["hf"], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    if quantised:
        config["quantization_config"] = {"quant_method": "compressed-tensors"}
        (folder / "config.json").write_text(json.dumps(config))
    teacher = replace(models[0], folders={"hf": folder})
    work = Workload.at_once("transformers", 1, 16, 9)
    told = {"transformers": {"device": "cpu"} | about}
    measured = {teacher.name: [twice_the_bound(models[0], work)]}
    found = roofline_json([teacher], measured, speedups=(), device=CPU, about=told)
    full = decode_bound(costs_of(models[0]), CPU, batch=1, context=mean_context(16, 9))
    parts = found["rows"][1]["parts"]
    assert parts["kv_s"] == pytest.approx(cache * full.kv_s)
    if weights is None:  # layers in one byte, the head in two
        assert full.weights_s / 4 < parts["weights_s"] < full.weights_s / 2
    else:
        assert parts["weights_s"] == pytest.approx(weights * full.weights_s, rel=0.02)


def test_a_compiled_engine_has_no_launches(models: list[ModelUnderTest]) -> None:
    teacher = models[0]
    about = {"transformers": ABOUT["transformers"] | {"mode": "compiled, CUDA graphs"}}
    measured = {
        teacher.name: [twice_the_bound(teacher, Workload.at_once("transformers", 1, 16, 9))]
    }
    found = roofline_json([teacher], measured, speedups=(), device=CPU, about=about)
    assert found["launches"] == {}
    assert {row["parts"]["launch_s"] for row in found["rows"]} == {None}
