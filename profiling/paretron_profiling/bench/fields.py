"""A result file of another tool, read with suspicion: bounded, every value asked for by type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paretron.artifacts.jsonfile import read_object
from paretron.errors import Code, ParetronError, Problem

MAX_FILE_BYTES = 256 << 20  # a thousand requests of a thousand tokens take 20 MB
LARGEST = 1e15  # no time, count or rate of a benchmark is larger
LONGEST_TEXT = 200


@dataclass(frozen=True)
class Fields:
    """One object of a result file of `tool`; `path` is the key that led to it."""

    values: Mapping[str, Any]
    tool: str
    file: str
    path: str = ""

    @classmethod
    def read(cls, file: Path, *, tool: str, marks: tuple[str, ...]) -> Fields:
        """The file's one JSON object, which has the keys `marks` if `tool` wrote it.

        Errors: INPUT_FILE, INPUT_LFS, and INPUT_CONFIG for what is no such object.
        """
        values = read_object(file, code=Code.INPUT_CONFIG, max_bytes=MAX_FILE_BYTES)
        fields = cls(values, tool, str(file))
        missing = [mark for mark in marks if mark not in values]
        if missing:
            raise fields.refused(missing[0], f"absent: this is no result file of {tool}")
        return fields

    def number(self, key: str, *, least: float = 0.0, most: float = LARGEST) -> float:
        """A finite number from `least` to `most`; INPUT_CONFIG for anything else."""
        return self._checked(key, self.values.get(key), least, most)

    def above_zero(self, key: str) -> float:
        """A number above 0; INPUT_CONFIG for anything else."""
        value = self.number(key)
        if not value > 0:
            raise self.refused(key, f"{value:g}, not above 0")
        return value

    def maybe(self, key: str) -> float | None:
        """A number from 0, or None where the key is absent or null."""
        return None if self.values.get(key) is None else self.number(key)

    def timed(self, key: str) -> float | None:
        """A time; None where it is absent, or exactly 0: what tools write when none was taken."""
        return self.maybe(key) or None

    def count(self, key: str, *, least: int = 0, most: float = LARGEST) -> int:
        """A whole number from `least` to `most`; INPUT_CONFIG for anything else."""
        value = self.number(key, least=least, most=most)
        if value != int(value):
            raise self.refused(key, f"{value:g}, not a whole number")
        return int(self.values[key])  # exact, also beyond what a float can tell apart

    def text(self, key: str) -> str | None:
        """A text, shortened; None where the key is absent or null."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, str):
            raise self.refused(key, f"a {type(value).__name__}, not a text")
        return shortened(value)

    def child(self, key: str) -> Fields:
        """An object below; INPUT_CONFIG where there is none."""
        value = self.values.get(key)
        if not isinstance(value, dict):
            raise self.refused(key, "absent" if value is None else "not an object")
        return Fields(value, self.tool, self.file, self._at(key))

    def maybe_child(self, key: str) -> Fields | None:
        """An object below, or None where the key is absent or null."""
        return None if self.values.get(key) is None else self.child(key)

    def items(self, key: str) -> list[Any]:
        """A list; INPUT_CONFIG where there is none."""
        value = self.values.get(key)
        if not isinstance(value, list):
            raise self.refused(key, "absent" if value is None else "not a list")
        return value

    def objects(self, key: str) -> list[Fields]:
        """A list of objects; INPUT_CONFIG where it is none."""
        found = []
        for place, value in enumerate(self.items(key)):
            if not isinstance(value, dict):
                raise self.refused(f"{key}[{place}]", "not an object")
            found.append(Fields(value, self.tool, self.file, self._at(f"{key}[{place}]")))
        return found

    def numbers(self, key: str, *, length: int | None = None) -> list[float]:
        """A list of numbers from 0, of a length; INPUT_CONFIG where it is none."""
        return self._numbers(key, self.items(key), length)

    def number_lists(self, key: str, *, length: int) -> list[list[float]]:
        """A list of so many lists of numbers from 0; INPUT_CONFIG where it is none."""
        found = self.items(key)
        self._check_length(key, found, length)
        return [self._numbers(f"{key}[{i}]", value, None) for i, value in enumerate(found)]

    def texts(self, key: str, *, length: int) -> list[str]:
        """A list of so many texts, each shortened; INPUT_CONFIG where it is none."""
        found = self.items(key)
        self._check_length(key, found, length)
        for place, value in enumerate(found):
            if not isinstance(value, str):
                raise self.refused(f"{key}[{place}]", "not a text")
        return [shortened(value) for value in found]

    def refused(self, key: str, cause: str) -> ParetronError:
        """The error that says what is wrong with a key."""
        return ParetronError(
            Problem(
                Code.INPUT_CONFIG,
                f"{self._at(key)} is {cause}",
                where=self.file,
                fix=f"name a whole result file of {self.tool}",
            )
        )

    def _at(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def _numbers(self, key: str, value: object, length: int | None) -> list[float]:
        if not isinstance(value, list):
            raise self.refused(key, "not a list")
        if length is not None:
            self._check_length(key, value, length)
        return [self._checked(f"{key}[{i}]", v, 0.0, LARGEST) for i, v in enumerate(value)]

    def _check_length(self, key: str, found: list[Any], length: int) -> None:
        if len(found) != length:
            raise self.refused(key, f"a list of {len(found)}, not of {length}")

    def _checked(self, key: str, value: object, least: float, most: float) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            kind = "absent" if value is None else f"a {type(value).__name__}, not a number"
            raise self.refused(key, kind)
        if not least <= value <= most:  # the reader of JSON refused what is not finite
            raise self.refused(key, f"{str(value)[:40]}, not from {least:g} to {most:g}")
        return float(value)


def shortened(text: str) -> str:
    """The last line of a text that says something, as far as it is worth keeping."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:LONGEST_TEXT] if lines else ""
