"""`paretron run`: one recipe in, measured and servable students out."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paretron.cli import options as o

if TYPE_CHECKING:
    from paretron.run.tracking import Tracker


def run(
    recipe: o.RecipeFile,
    out: o.RunOut = None,
    set_: o.Overrides = None,
    offline: o.Offline = False,
    overwrite: o.Overwrite = False,
    tensorboard: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write TensorBoard curves here.")
    ] = None,
    wandb: Annotated[
        str | None, typer.Option(metavar="PROJECT", help="Also log curves to this wandb project.")
    ] = None,
    trackio: Annotated[
        str | None, typer.Option(metavar="PROJECT", help="Also log curves to this trackio project.")
    ] = None,
    require_goals: o.RequireGoals = False,
    strict: o.Strict = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Run a recipe to its report; again to continue or to reuse what is done."""
    from paretron.cli.goals import goals_of, say_goals
    from paretron.cli.output import say_json
    from paretron.cli.progress import Progress
    from paretron.plan.plan import make_plan
    from paretron.recipe import load_recipe
    from paretron.run.events import Watcher
    from paretron.run.measure import require_unflagged
    from paretron.run.runner import run_plan
    from paretron.run.stages import STAGES
    from paretron.run.tracking import Tracked
    from paretron.run.workspace import Workspace
    from paretron_profiling.goals import require, require_some

    loaded = load_recipe(recipe, overrides=set_ or ())
    if require_goals:
        require_some(loaded.goals, where=str(recipe))  # before hours of work
    folder = out or Path("runs") / recipe.stem
    trackers = _trackers(tensorboard, wandb, trackio)
    plan = make_plan(loaded, out=folder, offline=offline)
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(plan, quiet=quiet or as_json))
        watcher: Watcher = progress
        for tracker in trackers:
            watcher = stack.enter_context(Tracked(tracker, then=watcher))
        report = run_plan(
            plan,
            folder,
            stages=STAGES,
            offline=offline,
            overwrite=overwrite,
            watcher=watcher,
        )
    page, verdicts = report / "report.html", goals_of(report)
    if strict and plan.recipe.profile is not None:
        require_unflagged(Workspace(folder).artifact("profile"))
    if require_goals:
        require(verdicts, where=str(page))
    if as_json:
        found = {"out": str(folder), "report": str(page), "goals": verdicts}
        say_json(found | {"notices": progress.notices})
    else:
        say_goals(verdicts)
        typer.echo(f"report: {page}")


def _trackers(tensorboard: Path | None, wandb: str | None, trackio: str | None) -> list[Tracker]:
    """Those that are asked for; OPTIONAL_MISSING for one that is not installed."""
    found: list[Tracker] = []
    if tensorboard is not None:
        from paretron.run.tensorboard import TensorBoard

        found.append(TensorBoard(tensorboard))
    if wandb is not None:
        from paretron.run.wandb import Wandb

        found.append(Wandb(wandb))
    if trackio is not None:
        from paretron.run.trackio import Trackio

        found.append(Trackio(trackio))
    return found
