"""What a family does to its head's output before it is called logits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paretron.errors import Code, ParetronError, Problem
from paretron.families.table import Family

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LogitRule:
    """logits = softcap(head(h) / divisor), where softcap(x) = c tanh(x / c), or x without one."""

    divisor: float = 1.0
    softcap: float | None = None

    def __call__(self, head_output: Tensor) -> Tensor:
        """The logits of what the head gave, in its dtype; the very same where there is no rule."""
        logits = head_output if self.divisor == 1.0 else head_output / self.divisor
        if self.softcap is None:
            return logits
        return (logits / self.softcap).tanh() * self.softcap


PLAIN = LogitRule()


def logit_rule(family: Family, config: Mapping[str, Any]) -> LogitRule:
    """The rule of a model; INPUT_CONFIG when its config states no positive number."""
    softcap = _positive(family, config, family.logit_softcap)
    return LogitRule(_positive(family, config, family.logit_divisor) or 1.0, softcap)


def _positive(family: Family, config: Mapping[str, Any], key: str) -> float | None:
    value = config.get(key, family.absent.get(key)) if key else None
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ParetronError(
            Problem(
                Code.INPUT_CONFIG, f"{key} is {str(value)[:60]!r}",
                where=f"config.json: {key}", fix="a positive number",
            )
        )  # fmt: skip
    return float(value)
