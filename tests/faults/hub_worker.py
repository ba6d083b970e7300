"""Plan a recipe and run the plan, every stage standing for itself alone; argv: RECIPE OUT."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

from paretron.artifacts.staging import staged
from paretron.plan.plan import make_plan
from paretron.recipe import load_recipe
from paretron.run.runner import Context, StageFunction, run_plan


def publish(context: Context) -> None:
    """An artifact that holds nothing but its provenance."""
    with staged(context.out, provenance=context.provenance) as folder:
        (folder / "stage.txt").write_text(context.stage.name)


def main(recipe: Path, out: Path) -> None:
    """Plan, then run."""
    plan = make_plan(load_recipe(recipe), out=out, offline=False)
    stages: defaultdict[str, StageFunction] = defaultdict(lambda: publish)
    run_plan(plan, out, stages=stages)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
