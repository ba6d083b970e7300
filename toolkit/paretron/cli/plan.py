"""`paretron plan`: what a recipe will make, what it costs, and every problem at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from paretron.cli import options as o
from paretron.cli.output import bytes_text, count_text, say_json, say_problems, seconds_text

if TYPE_CHECKING:
    from paretron.plan.cost import ModelFacts
    from paretron.plan.plan import Plan

_ROWS: dict[str, Callable[[ModelFacts], str]] = {
    "layers": lambda f: str(f.sizes["layers"]),
    "hidden": lambda f: str(f.sizes["hidden"]),
    "heads / KV heads": lambda f: (
        f"{f.sizes['kv_heads'] * f.sizes['q_per_kv']} / {f.sizes['kv_heads']}"
    ),
    "head_dim": lambda f: str(f.sizes["head_dim"]),
    "MLP": lambda f: str(f.sizes["ffn"]),
    "parameters": lambda f: str(f.params),
    "without embeddings": lambda f: str(f.non_embedding_params),
    "weights": lambda f: bytes_text(f.weight_bytes),
    "KV cache a token": lambda f: bytes_text(f.kv_bytes_per_token),
    "FLOP a token": lambda f: count_text(f.forward_flops_per_token),
}


def plan(
    recipe: o.RecipeFile,
    out: o.RunOut = None,
    set_: o.Overrides = None,
    offline: o.Offline = False,
    as_json: o.Json = False,
    verbose: o.Verbose = False,
) -> int:
    """Show a recipe's students, costs and problems, in seconds and without reading a weight."""
    from paretron.plan.plan import make_plan
    from paretron.recipe import load_recipe

    loaded = load_recipe(recipe, overrides=set_ or ())
    made = make_plan(loaded, out=out or Path("runs") / recipe.stem, offline=offline)
    if as_json:
        say_json(made.as_json())
    else:
        show_plan(made)
        say_problems(made.problems, as_json=False)
    return made.problems[0].code.exit if made.problems else 0


def show_plan(made: Plan) -> None:
    """Print the students' and the stages' tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    facts = {"teacher": made.teacher, **made.students}
    models = Table(title="Models", title_justify="left")
    models.add_column("", no_wrap=True)
    for name in facts:
        models.add_column(name, justify="right")
    for heading, value in _ROWS.items():
        models.add_row(heading, *(value(f) for f in facts.values()))
    console.print(models)
    stages = Table(title="Stages (estimates)", title_justify="left")
    for heading in ("", "FLOP", "time", "memory at least", "disk"):
        stages.add_column(heading, justify="left" if not heading else "right")
    for stage in made.stages:
        cost = made.estimates[stage.name]
        if not (cost.flops or cost.memory_bytes or cost.disk_bytes):
            continue
        stages.add_row(
            stage.name,
            count_text(cost.flops) if cost.flops else "",
            seconds_text(cost.seconds) if cost.flops else "",
            bytes_text(cost.memory_bytes) if cost.memory_bytes else "",
            bytes_text(cost.disk_bytes) if cost.disk_bytes else "",
        )
    console.print(stages)
    total = sum(e.seconds for e in made.estimates.values())
    console.print(
        f"in total {seconds_text(total)} on {made.hardware.name} at "
        f"{count_text(made.hardware.flop_s)}FLOP/s ({made.hardware.basis}); "
        f"{bytes_text(made.disk_bytes)} of disk, {bytes_text(made.disk_free_bytes)} free"
    )
