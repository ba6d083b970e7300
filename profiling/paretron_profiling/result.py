"""The outcome of a profiling run, and its file format `profile.v1`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from paretron.errors import ParetronError
from paretron_profiling.compare import Speedup
from paretron_profiling.schema import Measurement, jsonable

FORMAT = "profile.v1"


@dataclass(frozen=True)
class ProfileResult:
    """Measurements by model, speedups, and what they were measured with and on.

    incomplete says why the run stopped early, and is None for a whole run.
    """

    measurements: Mapping[str, tuple[Measurement, ...]]
    speedups: tuple[Speedup, ...]
    hardware: Mapping[str, Any]
    engines: Mapping[str, Mapping[str, str]]
    method: Mapping[str, Any]
    incomplete: str | None = None

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
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ProfileResult:
        """The inverse of to_json; ValueError for another format."""
        if data.get("schema") != FORMAT:
            raise ValueError(f"schema is {data.get('schema')!r}, expected {FORMAT!r}")
        return cls(
            {k: tuple(map(Measurement.from_json, v)) for k, v in data["models"].items()},
            tuple(map(Speedup.from_json, data["speedup"])),
            data["hardware"],
            data["engines"],
            data["method"],
            data["incomplete"],
        )


class ProfileStopped(ParetronError):
    """An engine failed in the middle; `partial` holds what was measured, marked incomplete."""

    def __init__(self, error: ParetronError, partial: ProfileResult) -> None:
        super().__init__(*error.problems)
        self.partial = partial
