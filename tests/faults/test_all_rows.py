"""Every promised fault has a test that carries its row's id."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

TREE = Path(__file__).parents[2]
# Group -> its rows: recipe and command line, input models, saving, pruning, distillation, exports.
PROMISED = {
    "R": (1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 14),
    "I": (1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 15, 16, 17, 18, 19, 21, 22, 23, 25, 26, 27),
    "S": (1, 2, 3, 4, 6, 7, 9, 10, 11, 12),
    "P": (1, 2, 3, 4, 5, 6, 7, 8, 10, 11),
    "D": (1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 15, 16, 17, 18, 19),
    "E": (1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13),
}
# Some stand with what they are about.
PLACES = ("tests/faults", "tests/containers", "tests/profiling")
ROWS = [f"{group}{number}" for group, numbers in PROMISED.items() for number in numbers]


@pytest.fixture(scope="module")
def ids() -> set[str]:
    """The row ids that stand in the names of collected tests."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider",
         "-o", "addopts=--import-mode=importlib", *PLACES],
        cwd=TREE, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
    names = [line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line]
    assert len(names) > 200
    found = re.findall(r"(?<![A-Za-z0-9])([RISPDE]\d+)(?!\d)", "\n".join(names), re.IGNORECASE)
    return {name.upper() for name in found}


@pytest.mark.parametrize("row", ROWS)
def test_a_row_has_a_test(row: str, ids: set[str]) -> None:
    assert row in ids


def test_a_row_that_is_none_has_no_test(ids: set[str]) -> None:
    assert not ids & {"R9", "R13", "I8", "I14", "I20", "I24", "S5", "S8", "P9", "D9", "D14"}
