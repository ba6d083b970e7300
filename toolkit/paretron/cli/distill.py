"""`paretron distill`: train a student against its teacher's logits, or keep what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paretron.cli import options as o


def distill(
    teacher: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Its teacher's checkpoint, or what --capture made of it."),
    ],
    recipe: o.RecipeOption,
    out: o.Out,
    student: Annotated[
        Path | None, typer.Argument(metavar="[STUDENT]", help="A pruned checkpoint.")
    ] = None,
    capture: Annotated[
        bool,
        typer.Option("--capture", help="Write what the teacher says of the text; no STUDENT."),
    ] = False,
    set_: o.Overrides = None,
    offline: o.Offline = False,
    overwrite: o.Overwrite = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Distil STUDENT from its teacher with a recipe's data and settings; again to continue.

    Where the recipe's correct.mode is parallel, a copy of the teacher is corrected meanwhile and
    written below the student, in teacher/.

    With --capture, ask the teacher once about the whole text instead and write its likeliest tokens
    (distill.loss.top_k of them), or with distill.offline=hidden its last hidden states. What this
    writes takes the place of the teacher, for any number of students.
    """
    from paretron.cli.output import opened
    from paretron.cli.progress import Progress
    from paretron.errors import Code, ParetronError, Problem
    from paretron.recipe import load_recipe
    from paretron.run.single import capture_alone, is_captured, train_alone
    from paretron.workers.launch import process_rank

    loaded = load_recipe(recipe, overrides=set_ or ())
    if capture == (student is not None):
        cause = "--capture asks the teacher alone" if capture else "no STUDENT to train"
        fix = "leave STUDENT out" if capture else "name a pruned checkpoint, or add --capture"
        raise ParetronError(Problem(Code.USAGE, cause, where="STUDENT", fix=fix))
    if not is_captured(teacher):
        opened(teacher)
    leads = process_rank() == 0  # of a torchrun of the user's own
    with Progress(None, quiet=quiet or not leads) as progress:
        on_event = progress.of("capture" if capture else "distill")
        if student is None:
            capture_alone(
                teacher, loaded, out=out, overwrite=overwrite, offline=offline, on_event=on_event
            )
        else:
            opened(student)
            train_alone(
                "distill", student, teacher, loaded, loaded.distill,
                out=out, overwrite=overwrite, offline=offline, correct=loaded.parallel_correction,
                on_event=on_event,
            )  # fmt: skip
    if leads:
        typer.echo(str(out))
