"""`paretron plan`: what a recipe will make, what it costs, and every problem at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from paretron.cli import options as o
from paretron.cli.output import (
    bytes_text,
    count_text,
    say_json,
    say_notices,
    say_problems,
    seconds_text,
)

if TYPE_CHECKING:
    from rich.table import Table

    from paretron.plan.advice import Advice
    from paretron.plan.cost import ModelFacts
    from paretron.plan.plan import Plan
    from paretron.plan.searching import SearchOutlook

_ROWS: dict[str, Callable[[ModelFacts], str]] = {
    "layers": lambda f: str(f.sizes["layers"]),
    "hidden": lambda f: str(f.sizes["hidden"]),
    "heads / KV heads": lambda f: (
        f"{f.sizes['kv_heads'] * f.sizes['q_per_kv']} / {f.sizes['kv_heads']}"
    ),
    "head_dim": lambda f: str(f.sizes["head_dim"]),
    "MLP": lambda f: str(f.sizes.get("ffn", "")),
    "experts": lambda f: str(f.sizes.get("experts", "")),
    "MLP of an expert": lambda f: str(f.sizes.get("moe_ffn", "")),
    "parameters": lambda f: str(f.params),
    "active for a token": lambda f: str(f.active_params) if f.active_params != f.params else "",
    "without embeddings": lambda f: str(f.non_embedding_params),
    "weights": lambda f: bytes_text(f.weight_bytes),
    "KV cache a token": lambda f: bytes_text(f.kv_bytes_per_token),
    "FLOP a token": lambda f: count_text(f.forward_flops_per_token),
}
_HEADING_WIDTH, _COLUMN_WIDTH = 23, 14  # characters, the lines between included


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
    say_notices(made.notices)
    if as_json:
        say_json(made.as_json())
    else:
        show_plan(made)
        say_problems(made.problems, as_json=False)
    return made.problems[0].code.exit if made.problems else 0


def show_plan(made: Plan) -> None:
    """Print the students' and the stages' tables, the totals, and what to think about."""
    from rich.console import Console
    from rich.padding import Padding

    console = Console(highlight=False)
    facts = list({"teacher": made.teacher, **made.students}.items())
    beside = max(1, (console.width - _HEADING_WIDTH) // _COLUMN_WIDTH)
    for start in range(0, len(facts), beside):
        console.print(_models_table(dict(facts[start : start + beside])))
    console.print(_stages_table(made))
    total = sum(e.seconds for e in made.estimates.values())
    console.print(
        f"in total {seconds_text(total)} on {made.hardware.name} at "
        f"{count_text(made.hardware.flop_s)}FLOP/s ({made.hardware.basis}); "
        f"{bytes_text(made.disk_bytes)} of disk, {bytes_text(made.disk_free_bytes)} free",
        markup=False,
    )
    for name, search in made.searches.items():
        console.print(search_text(name, search), markup=False)
    if made.advice:
        console.print("\n[italic]Will it be faster?[/italic]")
    for advice in made.advice:
        console.print(Padding(advice_text(advice), (0, 0, 0, 2), expand=False))


def search_text(name: str, search: SearchOutlook) -> str:
    """A search's space, ends and candidates as a line; its student above is the largest of them."""
    ends = f"{count_text(search.smallest.params)} to {count_text(search.largest.params)} parameters"
    if search.candidates is None:
        found = "candidates within the budget are known when the shapes have been timed"
    else:
        found = f"{search.candidates} candidates within the budget"
    return f"{name} searches {search.shapes} shapes of {ends}: {found}"


def advice_text(advice: Advice) -> str:
    """One finding as a line, and the better sizes with their price as another."""
    text = f"{advice.where}: {advice.finding}"
    better = [
        f"{size} ({'+' if added > 0 else '-'}{count_text(abs(added))} parameters)"
        for size, added in advice.nearest.items()
    ]
    return f"{text}\n  nearest: {' or '.join(better)}" if better else text


def _models_table(facts: Mapping[str, ModelFacts]) -> Table:
    from rich.table import Table

    models = Table(title="Models", title_justify="left")
    models.add_column("", no_wrap=True)
    for name in facts:
        models.add_column(name, justify="right")
    for heading, value in _ROWS.items():
        cells = [value(f) for f in facts.values()]
        if any(cells):
            models.add_row(heading, *cells)
    return models


def _stages_table(made: Plan) -> Table:
    from rich.table import Table

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
    return stages
