"""The one error type, its closed list of codes, and the exit code of each."""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass


class Code(enum.Enum):
    """What can go wrong; the value is stable and appears in JSON output and logs."""

    # 2: the recipe or the command line
    RECIPE_SYNTAX = "recipe.syntax"
    RECIPE_UNKNOWN_KEY = "recipe.unknown_key"
    RECIPE_VALUE = "recipe.value"
    RECIPE_TARGET = "recipe.target"
    USAGE = "usage.argument"
    OUT_EXISTS = "usage.out_exists"
    OUT_OVERLAP = "usage.out_overlap"
    RUN_MISMATCH = "run.mismatch"
    # 3: an input artifact
    INPUT_MISSING = "input.missing"
    INPUT_CONFIG = "input.config"
    INPUT_FAMILY = "input.family"
    INPUT_FILE = "input.file"
    HEADER_JSON = "input.header_json"
    HEADER_LENGTH = "input.header_length"
    HEADER_DUPLICATE = "input.header_duplicate"
    HEADER_ENTRY = "input.header_entry"
    HEADER_DTYPE = "input.header_dtype"
    HEADER_SHAPE = "input.header_shape"
    HEADER_OFFSETS = "input.header_offsets"
    HEADER_OVERLAP = "input.header_overlap"
    HEADER_HOLE = "input.header_hole"
    HEADER_TRAILING = "input.header_trailing"
    INPUT_EXTERNAL = "input.external_data"
    INPUT_TRUNCATED = "input.truncated"
    INPUT_INDEX = "input.index"
    INPUT_UNSAFE_PATH = "input.unsafe_path"
    INPUT_SHAPE = "input.shape"
    INPUT_DTYPE = "input.dtype"
    INPUT_UNKNOWN_TENSOR = "input.unknown_tensor"
    INPUT_MISSING_TENSOR = "input.missing_tensor"
    INPUT_TIED = "input.tied"
    INPUT_NONFINITE = "input.nonfinite"
    INPUT_PICKLE = "input.pickle"
    INPUT_LFS = "input.lfs"
    INPUT_TOKENIZER = "input.tokenizer"
    INPUT_CORPUS = "input.corpus"
    INPUT_MANIFEST = "input.manifest"
    INPUT_CHECKSUM = "input.checksum"
    INPUT_OFFLINE = "input.offline"
    # 4: resources
    DISK = "resource.disk"
    MEMORY = "resource.memory"
    LOCKED = "resource.locked"
    ENGINE = "resource.engine"
    DEVICE = "resource.device"
    # 5: a verification gate
    GATE_PARITY = "gate.parity"
    GATE_RELOAD = "gate.reload"
    GATE_NONFINITE = "gate.nonfinite"
    GATE_PREFLIGHT = "gate.preflight"
    GATE_GOALS = "gate.goals"
    GATE_FLAGGED = "gate.flagged"
    # 6: an optional component
    OPTIONAL_MISSING = "optional.missing"
    OPTIONAL_OLD = "optional.old"
    UNSUPPORTED = "optional.unsupported"
    # 75: stopped on request; the same command resumes
    INTERRUPTED = "run.interrupted"

    @property
    def exit(self) -> int:
        """The process exit code of this kind of error."""
        return _EXIT[self.value.split(".")[0]] if self is not Code.INTERRUPTED else 75


_EXIT = {"recipe": 2, "usage": 2, "run": 2, "input": 3, "resource": 4, "gate": 5, "optional": 6}


# Access tokens as hubs and forges write them; a message that quotes a value may quote one.
_SECRET = re.compile(r"\b(hf_|sk-|nvapi-|gh[pousr]_|github_pat_|glpat-)[A-Za-z0-9_-]{16,}")


def redacted(text: str) -> str:
    """The text with the rest of every access token in it left out."""
    return _SECRET.sub(r"\1***", text)


@dataclass(frozen=True)
class Problem:
    """One finding: what was wrong, where (file, key, tensor), and what to do next."""

    code: Code
    cause: str
    where: str = ""
    fix: str = ""

    def __post_init__(self) -> None:
        for name in ("cause", "where", "fix"):
            object.__setattr__(self, name, _one_line(redacted(getattr(self, name))))

    def as_json(self) -> dict[str, str]:
        """The stable JSON form that `--json` prints."""
        return {"code": self.code.value, "cause": self.cause, "where": self.where, "fix": self.fix}

    def __str__(self) -> str:
        where = f"{self.where}: " if self.where else ""
        fix = f"\n  fix: {self.fix}" if self.fix else ""
        return f"[{self.code.value}] {where}{self.cause}{fix}"


# Between the lines of a log that is quoted: indented so far that none can pass for our own.
QUOTED = "\n    | "


def _one_line(text: str) -> str:
    """What a file says may be quoted, but it must not move the cursor or break the line."""
    if text.isprintable():
        return text
    return QUOTED.join(
        "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
        for line in text.split(QUOTED)
    )


class ParetronError(Exception):
    """Every failure a user can meet, as one or more problems."""

    def __init__(self, first: Problem, *others: Problem) -> None:
        self.problems: tuple[Problem, ...] = (first, *others)
        super().__init__("\n".join(map(str, self.problems)))

    @property
    def exit_code(self) -> int:
        """The exit code of the first problem."""
        return self.problems[0].code.exit


def raise_all(problems: Sequence[Problem]) -> None:
    """Raise one error with every problem, or return when there is none."""
    if problems:
        raise ParetronError(*problems)
