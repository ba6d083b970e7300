"""What else a unit's importance may be: one function for each criterion, by its recipe's name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from paretron.importance.criteria.fluctuation import fluctuation
from paretron.importance.criteria.magnitude import magnitude
from paretron.importance.criteria.material import Importance, Material
from paretron.importance.criteria.random import random
from paretron.importance.criteria.taylor import taylor

CRITERIA: Mapping[str, Callable[[Material], Importance]] = {
    "random": random,
    "magnitude": magnitude,
    "taylor": taylor,
    "fluctuation": fluctuation,
}
