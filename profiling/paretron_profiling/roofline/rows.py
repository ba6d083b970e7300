"""Measurements beside their bounds: what share of a device's speed an engine attains, and why.

A batch at once has a prefill and decode steps of its size. In a closed loop, requests are prefilled
one by one and decoded together, at most `load` of them: its rows compare the median TTFT with the
bound of one prompt, and the median TPOT with that of `load` requests. An open loop has no rows: how
many requests run together is its outcome.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import linear_regression
from typing import Any

from paretron.artifacts.jsonfile import read_object
from paretron.errors import Code
from paretron.families import family_of, parameter_counts
from paretron.plugins import ENGINES, find_plugin
from paretron_profiling.compare import Speedup
from paretron_profiling.models import TEACHER, ModelUnderTest, counted_config
from paretron_profiling.roofline.bounds import (
    BYTES,
    DECODE,
    LAUNCHES,
    Bound,
    Costs,
    Formats,
    decode_bound,
    mean_context,
    prefill_bound,
)
from paretron_profiling.roofline.devices import Device
from paretron_profiling.schema import CLOSED, OFFLINE, Measurement, Workload, jsonable

_WORKLOAD = ("engine", "mode", "load", "input_len", "output_len")

About = Mapping[str, Mapping[str, object]]  # by engine: what it ran with


def roofline_json(
    models: Sequence[ModelUnderTest],
    measured: Mapping[str, Sequence[Measurement]],
    *,
    speedups: Sequence[Speedup],
    device: Device,
    about: About,
) -> dict[str, Any]:
    """The part `roofline` of profile.json: rows, predicted speedups, what layers cost, notes.

    An engine that does not say that it ran on a device of this kind has no rows, and a note.
    """
    notes = [_note(engine, device) for engine in about if not _is_on(about[engine], device)]
    works = {m.workload for found in measured.values() for m in found}
    if any(work.mode not in (OFFLINE, CLOSED) for work in works):
        notes.append("open loops have no bound: how many requests run together is their outcome")
    bounds = _Bounds({m.name: m for m in models}, device, about)
    rows = [
        row
        for model in models
        for m in measured.get(model.name, ())
        for row in _rows(model.name, m, bounds)
    ]
    if any(row["attained"] is not None and row["attained"] > 1 for row in rows):
        notes.append(
            "where a run attains more than its bound, the device was busier when it was probed, or "
            "the engine's products are faster than torch's"
        )
    launches = {name: asdict(LAUNCHES[name]) for name in about if bounds.launches(name)}
    out: dict[str, Any] = jsonable(
        {
            "rows": rows,
            "speedup": [s for one in speedups for s in _predicted(one, models, bounds)],
            "overheads": list(_overheads(rows, bounds)),
            "launches": launches,
            "notes": notes,
        }
    )
    return out


class _Bounds:
    """Bounds of models under workloads; a model's config is read once for each engine."""

    def __init__(self, models: Mapping[str, ModelUnderTest], device: Device, about: About) -> None:
        self._models, self._device, self._about = models, device, about
        self._costs: dict[tuple[str, str], Costs] = {}

    def of(self, model: str, work: Workload) -> tuple[Bound, Bound] | None:
        """Of a prefill and of a decode step; None where there is none to state."""
        about = self._about.get(work.engine, {})
        if work.mode not in (OFFLINE, CLOSED) or not _is_on(about, self._device):
            return None
        key = (model, work.engine)
        if key not in self._costs:
            self._costs[key] = _costs(self._models[model], work.engine, about, self._device)
        costs, launches = self._costs[key], self.launches(work.engine)
        first = prefill_bound(
            costs, self._device, launches=launches, input_len=work.input_len,
            batch=work.load if work.mode == OFFLINE else 1,
        )  # fmt: skip
        step = decode_bound(
            costs, self._device, launches=launches, batch=work.load,
            context=mean_context(work.input_len, work.output_len),
        )  # fmt: skip
        return first, step

    def layers(self, model: str, engine: str) -> int:
        """How many layers a model has that was bounded before."""
        return self._costs[model, engine].layers

    def launches(self, engine: str) -> Any:
        """What the engine starts; None where it is not known, as with compiled graphs."""
        about = self._about.get(engine, {})
        eager = "eager" in str(about.get("mode", "eager"))
        return LAUNCHES.get(engine) if eager and _is_on(about, self._device) else None


def _rows(model: str, m: Measurement, bounds: _Bounds) -> Iterator[dict[str, Any]]:
    found = bounds.of(model, m.workload)
    if found is None:
        return
    for bound, measured_s in zip(found, _measured(m), strict=True):
        yield {
            "model": model,
            **asdict(m.workload),
            "phase": bound.phase,
            **bound.as_json(),
            "measured_s": measured_s,
            "attained": bound.bound_s / measured_s if measured_s else None,
        }


def _overheads(rows: Sequence[Mapping[str, Any]], bounds: _Bounds) -> Iterator[dict[str, Any]]:
    """What decode steps take beyond their bounds, as a constant and so much for each layer.

    Least squares over the models of one workload, where they differ in depth: what an engine costs
    that no device's figure says, and a student of fewer layers saves. `unexplained_s` is what the
    line misses at most; two models are met exactly.
    """
    groups: dict[tuple[Any, ...], list[tuple[int, float]]] = {}
    for row in rows:
        if row["phase"] == DECODE and row["measured_s"]:
            key = tuple(row[name] for name in _WORKLOAD)
            layers = bounds.layers(row["model"], row["engine"])
            groups.setdefault(key, []).append((layers, row["measured_s"] - row["bound_s"]))
    for key, points in groups.items():
        if len({layers for layers, _ in points}) < 2:
            continue
        slope, constant = linear_regression(*zip(*points, strict=True))
        missed = max(abs(beyond - constant - slope * layers) for layers, beyond in points)
        yield dict(zip(_WORKLOAD, key, strict=True)) | {
            "models": len(points),
            "per_layer_s": slope,
            "outside_s": constant,
            "unexplained_s": missed,
        }


def _measured(m: Measurement) -> tuple[float | None, float | None]:
    """Seconds of the prefill and of a decode step."""
    if m.mode == OFFLINE:
        prefill = m.load * m.input_len / m.prefill_tok_s if m.prefill_tok_s else None
        return prefill, m.load / m.decode_tok_s if m.decode_tok_s else None
    return (
        m.ttft_ms / 1e3 if m.ttft_ms is not None else None,
        m.tpot_ms / 1e3 if m.tpot_ms is not None else None,
    )


def _predicted(
    one: Speedup, models: Sequence[ModelUnderTest], bounds: _Bounds
) -> Iterator[dict[str, Any]]:
    """A measured ratio of batches sent at once, beside the one that bounds and launches give."""
    teacher = next(m.name for m in models if m.kind == TEACHER)
    rates = []
    for model, load in ((one.model, one.load), (teacher, one.teacher_load)):
        work = Workload(one.engine, one.mode, load, one.input_len, one.output_len)
        found = bounds.of(model, work) if one.mode == OFFLINE else None
        if found is None:  # a loop's throughput follows from how its requests overlap
            return
        first, step = found
        rates.append(load / (first.with_launch_s + (one.output_len - 1) * step.with_launch_s))
    keys = ("model", "engine", "rule", "mode", "load", "teacher_load", "input_len", "output_len")
    yield {key: getattr(one, key) for key in keys} | {
        "ratio": one.ratio,
        "predicted": rates[0] / rates[1],
    }


def _costs(
    model: ModelUnderTest, engine: str, about: Mapping[str, object], device: Device
) -> Costs:
    """Costs of the form that the engine ran.

    A checkpoint runs in the dtype that the engine states, or lies quantised; what an ONNX folder's
    weights take on average tells its format, and the CPU holds keys and values in 32 bits then.
    """
    form = find_plugin(ENGINES, engine, where="profile.engines").wants
    folder = model.folders[form]
    raw = read_object(next(_with_config(model, folder)) / "config.json", code=Code.INPUT_CONFIG)
    config = counted_config(raw)
    params = parameter_counts(family_of(config), config).total
    if form != "hf":
        per_weight = _size(folder, "*.onnx*") / params
        return Costs.of(
            config, formats=_onnx_formats(per_weight, device), bytes_per_weight=per_weight
        )
    said = (about.get("dtype"), raw.get("dtype"), raw.get("torch_dtype"), "float32")
    dtype = next(name for name in map(str, said) if name in BYTES)
    narrow = about.get("weights")  # of the layers' matrices, where they are quantised on loading
    if narrow in BYTES:
        return Costs.of(config, formats=Formats(str(narrow), dtype, dtype))
    if not raw.get("quantization_config"):
        return Costs.of(config, formats=Formats.of(dtype))
    per_weight = _size(folder, "*.safetensors") / params
    return Costs.of(config, formats=Formats("int8", dtype, dtype), bytes_per_weight=per_weight)


def _onnx_formats(bytes_per_weight: float, device: Device) -> Formats:
    if bytes_per_weight > 3:
        return Formats.of("float32")
    wide = "float32" if device.kind == "cpu" else "float16"
    return Formats.of("float16") if bytes_per_weight > 1.8 else Formats("int8", wide, wide)


def _with_config(model: ModelUnderTest, folder: Path) -> Iterator[Path]:
    """The export's own folder where it keeps a config.json, else the checkpoint's."""
    yield from (f for f in (folder, *model.folders.values()) if (f / "config.json").is_file())


def _size(folder: Path, pattern: str) -> int:
    return sum(p.stat().st_size for p in folder.glob(pattern))


def _is_on(about: Mapping[str, object], device: Device) -> bool:
    return str(about.get("device", "")).split(":")[0] == device.kind


def _note(engine: str, device: Device) -> str:
    return f"{engine}: no bound, it does not say that it ran on this {device.kind} device"
