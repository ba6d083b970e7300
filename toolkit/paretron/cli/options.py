"""The options that verbs share, each spelt once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paretron.cli.completion import recipe_keys

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe (YAML).")]
RecipeOption = Annotated[
    Path, typer.Option("--recipe", metavar="RECIPE", help="The recipe whose settings are used.")
]
ModelFolder = Annotated[Path, typer.Argument(metavar="MODEL", help="A checkpoint's folder.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a recipe key, as in distill.lr=1e-4.",
        autocompletion=recipe_keys,
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where to write.")]
RunOut = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="DIR", help="The run's folder; default runs/RECIPE."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never use the network.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is at --out.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Tracebacks with errors.")]
RequireGoals = Annotated[
    bool, typer.Option("--require-goals", help="Exit 5 unless every goal of the recipe is met.")
]
Strict = Annotated[
    bool, typer.Option("--strict", help="Exit 5 where a measured speed is flagged as doubtful.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
