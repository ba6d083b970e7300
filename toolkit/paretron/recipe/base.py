"""What all sections of a recipe share: strictness, and the kinds of numbers and names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

AnyPath = TypeVar("AnyPath", str, Path)
_LONGEST_NAME = 255


def _written_as_number(value: object) -> object:
    # true is 1 to Python, and "64" is 64 to pydantic; who writes them in a recipe means neither.
    if isinstance(value, bool | str):
        raise PydanticCustomError("number", "Input should be a number")
    return value


def _nameable(value: AnyPath) -> AnyPath:
    # Asking for such a file is an error of the system's own, wherever it is asked.
    longest = max(len(part.encode()) for part in str(value).split("/"))
    if longest > _LONGEST_NAME:
        raise PydanticCustomError(
            "place",
            "A name of {found} bytes is longer than the {longest} that a file may have",
            {"found": longest, "longest": _LONGEST_NAME},
        )
    return value


NUMBER = BeforeValidator(_written_as_number)
NAMEABLE = AfterValidator(_nameable)
Positive = Annotated[int, NUMBER, Field(gt=0, le=10**9)]
Count = Annotated[int, NUMBER, Field(ge=0, le=10**9)]
SeqLen = Annotated[int, NUMBER, Field(ge=2, le=10**9)]  # a token is learned from the one before it
# 2.0e9 is how people write tokens; the value must still be a whole number.
Tokens = Annotated[int, NUMBER, Field(gt=0, le=10**15)]
Rate = Annotated[float, NUMBER, Field(gt=0, lt=1, allow_inf_nan=False)]
Share = Annotated[float, NUMBER, Field(ge=0, lt=1, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$")]
# A path or an id: no control characters, and no longer than a file system takes.
Place = Annotated[str, Field(min_length=1, max_length=1000, pattern=r"^[^\x00-\x1f]+$"), NAMEABLE]


class Section(BaseModel):
    """What all sections share: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
