"""The outcome of a profiling run, and its file format `profile.v1`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from paretron.errors import Code, ParetronError, Problem
from paretron_profiling.compare import Speedup
from paretron_profiling.footprint import MemoryPeak
from paretron_profiling.schema import FLAGS, Measurement, jsonable

FORMAT = "profile.v1"


@dataclass(frozen=True)
class ProfileResult:
    """Measurements by model, speedups, and what they were measured with and on.

    incomplete says why the run stopped early, and is None for a whole run. `device` holds what a
    probe of the machine found, `roofline` the bounds that follow from it; both are None where
    nobody asked.
    """

    measurements: Mapping[str, tuple[Measurement, ...]]
    speedups: tuple[Speedup, ...]
    hardware: Mapping[str, Any]
    engines: Mapping[str, Mapping[str, str]]
    method: Mapping[str, Any]
    incomplete: str | None = None
    memory: tuple[MemoryPeak, ...] = ()
    device: Mapping[str, Any] | None = None
    roofline: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """The content of profile.json, raw samples included."""
        return {
            "schema": FORMAT,
            "incomplete": self.incomplete,
            "models": {
                name: [m.to_json() for m in found] for name, found in self.measurements.items()
            },
            "speedup": [s.to_json() for s in self.speedups],
            "hardware": jsonable(self.hardware),
            "engines": jsonable(self.engines),
            "method": jsonable(self.method),
            "memory": [peak.to_json() for peak in self.memory],
            "device": jsonable(self.device),
            "roofline": jsonable(self.roofline),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ProfileResult:
        """The inverse of to_json; ValueError for another format.

        What a file from before there was such a figure lacks is empty.
        """
        if data.get("schema") != FORMAT:
            raise ValueError(f"schema is {data.get('schema')!r}, expected {FORMAT!r}")
        return cls(
            {k: tuple(map(Measurement.from_json, v)) for k, v in data["models"].items()},
            tuple(map(Speedup.from_json, data["speedup"])),
            data["hardware"],
            data["engines"],
            data["method"],
            data["incomplete"],
            tuple(map(MemoryPeak.from_json, data.get("memory", ()))),
            data.get("device"),
            data.get("roofline"),
        )


def flagged(result: ProfileResult, *, where: str) -> list[Problem]:
    """Every measurement that something makes doubtful, for those who will not have it."""
    return [
        Problem(
            Code.GATE_FLAGGED,
            f"{name} on {m.engine}, {m.mode} {m.load:g}, {m.input_len} + {m.output_len} tokens: "
            + "; ".join(FLAGS[flag] for flag in m.flags),
            where=where,
            fix="a quiet machine; more `repeats`, a `warmup`, or `min_seconds`",
        )
        for name, found in result.measurements.items()
        for m in found
        if m.flags
    ]


class ProfileStopped(ParetronError):
    """An engine failed in the middle; `partial` holds what was measured, marked incomplete."""

    def __init__(self, error: ParetronError, partial: ProfileResult) -> None:
        super().__init__(*error.problems)
        self.partial = partial
