"""`paretron eval`: loss on a recipe's held-out texts, and what a checkpoint reaches in tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paretron.cli import options as o

if TYPE_CHECKING:
    from paretron.recipe import Engine, Evaluate

Tasks = Annotated[
    str | None,
    typer.Option(
        "--tasks", metavar="A,B", help="Tasks of lm-eval, or YAML files, instead of a recipe's."
    ),
]
Suite = Annotated[str | None, typer.Option("--suite", help="A suite of tasks, as minitron-base.")]
RunCode = Annotated[
    bool, typer.Option("--run-code", help="Let tasks run what a model writes, without a sandbox.")
]


def evaluate(
    model: o.ModelFolder,
    out: o.Out,
    recipe: Annotated[
        Path | None,
        typer.Option(
            "--recipe", metavar="RECIPE", help="The recipe whose texts and tasks are used."
        ),
    ] = None,
    tasks: Tasks = None,
    suite: Suite = None,
    run_code: RunCode = False,
    server: Annotated[
        str | None,
        typer.Option(
            "--server",
            metavar="URL",
            help="Judge what an OpenAI-compatible server answers; MODEL has its tokenizer.",
        ),
    ] = None,
    served_name: Annotated[
        str | None,
        typer.Option("--served-name", help="The model's name there, where it serves several."),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="NAME=PYTHON", help="Judge MODEL as vllm_server, started here, serves it."
        ),
    ] = None,
    set_: o.Overrides = None,
    offline: o.Offline = False,
    overwrite: o.Overwrite = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Measure MODEL on the texts and tasks that the recipe's `evaluate` names; again to continue.

    Without a recipe, in the tasks named here alone.
    """
    import json

    from paretron.artifacts.staging import refuse_overlap
    from paretron.cli.output import opened, say_json
    from paretron.cli.progress import Progress
    from paretron.recipe import load_recipe
    from paretron.run.signals import interruptible
    from paretron.run.single import evaluate_alone

    refuse_overlap(out, model)
    if set_:
        _needs(recipe, "--recipe", where="--set", cause="it changes a recipe, and none is named")
    if served_name:
        cause = "it names a model of a server, and none is named"
        _needs(server, "--server", where="--served-name", cause=cause)
    loaded = load_recipe(recipe, overrides=set_ or ()) if recipe is not None else None
    settings = _settings(loaded.evaluate if loaded else None, tasks, suite, run_code=run_code)
    notices = opened(model).notices if server is None and engine is None else ()
    with interruptible(), Progress(None, quiet=quiet or as_json) as progress:
        evaluate_alone(
            model,
            dict(loaded.data) if loaded is not None else {},
            settings=settings,
            server=server,
            served_name=served_name,
            engine=_engine(engine, server),
            out=out,
            overwrite=overwrite,
            offline=offline,
            on_event=progress.of("eval"),
        )
    found = json.loads((out / "evaluation.json").read_text())
    if as_json:
        say_json(found | {"notices": list(notices)})
        return
    for line in _lines(found):
        typer.echo(line)


def _needs(given: object, option: str, *, where: str, cause: str) -> None:
    """USAGE unless the option that another one belongs to is given, too."""
    from paretron.errors import Code, ParetronError, Problem

    if given is None:
        raise ParetronError(Problem(Code.USAGE, cause, where=where, fix=f"add {option}"))


def _engine(named: str | None, server: str | None) -> Engine | None:
    """The engine to serve MODEL with; USAGE beside a server that runs already."""
    from pydantic import ValidationError

    from paretron.errors import Code, ParetronError, Problem
    from paretron.recipe import Engine
    from paretron.run.measure import engines_by_name

    if named is None:
        return None
    if server is not None:
        cause = "one server answers: an engine's own, or one that runs already"
        raise ParetronError(Problem(Code.USAGE, cause, where="--engine", fix="drop --server"))
    try:
        (found,) = map(Engine.model_validate, engines_by_name([named], servers=()))
    except ValidationError as error:
        cause = f"no engine has the name {named.partition('=')[0]!r}"
        fix = "vllm_server=PYTHON"
        raise ParetronError(Problem(Code.USAGE, cause, where="--engine", fix=fix)) from error
    return found


def _settings(
    stated: Evaluate | None, tasks: str | None, suite: str | None, *, run_code: bool
) -> Evaluate:
    """What a recipe says, with what the options say in its place."""
    from pydantic import ValidationError

    from paretron.errors import Code, ParetronError, Problem
    from paretron.recipe import Evaluate

    given: dict[str, Any] = {}
    if tasks is not None or suite is not None:
        names = [name.strip() for name in (tasks or "").split(",")]
        given = {"tasks": [name for name in names if name], "suite": suite}
    if run_code:
        given["run_code"] = True
    known = {"perplexity": ()} if stated is None else stated.model_dump()
    try:
        settings = Evaluate.model_validate(known | given)
    except ValidationError as error:
        cause = error.errors()[0]["msg"].removeprefix("Value error, ")
        fix = "`lm-eval ls tasks` lists the tasks, the README the suites"
        raise ParetronError(
            Problem(Code.USAGE, cause, where="--tasks, --suite", fix=fix)
        ) from error
    if not settings.perplexity and not settings.asked:
        cause, fix = "nothing to measure MODEL on", "--recipe, --tasks or --suite"
        raise ParetronError(Problem(Code.USAGE, cause, where="eval", fix=fix))
    return settings


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    """What evaluation.json holds, a line for each text and task."""
    for name, loss in found["texts"].items():
        between = "" if loss["low"] is None else f" ({loss['low']:.4f} to {loss['high']:.4f})"
        yield (
            f"{name}: loss {loss['loss']:.4f}{between} nats/token, perplexity "
            f"{loss['perplexity']:.3f} over {loss['tokens']} tokens, by {loss['per']}"
        )
    for name, score in found["tasks"].items():
        yield f"{name}: {_said(score)}"
    for name, reason in found["left_out"].items():
        yield f"{name}: left out: {reason}"


def _said(score: dict[str, Any]) -> str:
    """A task's figure in a line: "acc 0.6120 (0.5814 to 0.6417) over 1000 documents, 5-shot"."""
    between = "" if score["low"] is None else f" ({score['low']:.4f} to {score['high']:.4f})"
    return (
        f"{score['metric']} {score['value']:.4f}{between} over {score['samples']} documents, "
        f"{score['few_shot']}-shot"
    )
