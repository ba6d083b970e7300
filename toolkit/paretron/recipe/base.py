"""What all sections of a recipe share: strictness, and the kinds of numbers and names."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


def _written_as_number(value: object) -> object:
    # true is 1 to Python, and "64" is 64 to pydantic; who writes them in a recipe means neither.
    if isinstance(value, bool | str):
        raise PydanticCustomError("number", "Input should be a number")
    return value


NUMBER = BeforeValidator(_written_as_number)
Positive = Annotated[int, NUMBER, Field(gt=0, le=10**9)]
Count = Annotated[int, NUMBER, Field(ge=0, le=10**9)]
SeqLen = Annotated[int, NUMBER, Field(ge=2, le=10**9)]  # a token is learned from the one before it
# 2.0e9 is how people write tokens; the value must still be a whole number.
Tokens = Annotated[int, NUMBER, Field(gt=0, le=10**15)]
Rate = Annotated[float, NUMBER, Field(gt=0, lt=1, allow_inf_nan=False)]
Share = Annotated[float, NUMBER, Field(ge=0, lt=1, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$")]
# A path or an id: no control characters, and no longer than a file system takes.
Place = Annotated[str, Field(min_length=1, max_length=1000, pattern=r"^[^\x00-\x1f]+$")]


class Section(BaseModel):
    """What all sections share: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
