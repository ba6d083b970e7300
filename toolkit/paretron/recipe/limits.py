"""What an engine cannot take of a recipe, said alike when planning and when measuring."""

from __future__ import annotations

from paretron.errors import Code, Problem
from paretron.recipe.models import Profile


def batch_problems(profile: Profile, *, engine: str, largest_batch: int | None) -> list[Problem]:
    """The recipe's batches above an engine's largest; none where only memory limits it."""
    return [
        Problem(
            Code.RECIPE_VALUE,
            f"{engine} takes batches of at most {largest_batch}, not {batch}",
            where="profile.batches",
            fix=f"at most {largest_batch}",
        )
        for batch in profile.batches
        if largest_batch is not None and batch > largest_batch
    ]
