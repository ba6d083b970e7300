"""The `paretron` command: verbs, exit codes, and how an error looks."""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated, Any

import typer

from paretron import __version__
from paretron.cli import (
    bench,
    check,
    correct,
    diff,
    distill,
    doctor,
    evaluate,
    export,
    inspect,
    plan,
    profile,
    prune,
    recipes,
    report,
    roofline,
    run,
    score,
    search,
    table,
    verify,
)
from paretron.cli.output import say_problems, say_traceback
from paretron.errors import Code, ParetronError, Problem
from paretron.run.signals import interruptible

# A path that the system refuses is the user's to change, not a bug of ours.
_PATH_REFUSED = (
    errno.EACCES, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EPERM,
    errno.EROFS,
)  # fmt: skip

_STOPPED = 130  # what typer makes of Ctrl-C

# A line each, as a table for people and for scripts.
EXIT_CODES = {
    0: "done",
    1: "a bug in Paretron",
    2: "the recipe or the command line",
    3: "an input artifact: absent, broken or hostile",
    4: "resources: disk, memory, a lock, an engine, a device",
    5: "a gate: what was made is not equal, or a goal or a rule that was required does not hold",
    6: "an optional component: missing, too old, or it cannot do that",
    75: "stopped on request; the same command goes on",
}

app = typer.Typer(
    name="paretron",
    help="From a pretrained language model to smaller, measured, servable ones.",
    epilog="Exit codes: " + "; ".join(f"{code} {what}" for code, what in EXIT_CODES.items()),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("run")(run.run)
app.command("plan")(plan.plan)
app.command("check")(check.check)
app.command("inspect")(inspect.inspect)
app.command("score")(score.score)
app.command("search")(search.search)
app.command("table")(table.table)
app.command("prune")(prune.prune)
app.command("correct")(correct.correct)
app.command("distill")(distill.distill)
app.command("eval")(evaluate.evaluate)
app.command("export")(export.export)
app.command("profile")(profile.profile)
app.command("bench")(bench.bench)
app.command("roofline")(roofline.roofline)
app.command("report")(report.report)
app.command("diff")(diff.diff)
app.command("verify")(verify.verify)
app.command("doctor")(doctor.doctor)
app.add_typer(recipes.app, name="recipes")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"paretron {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Callbacks that stand before every verb."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with one of EXIT_CODES."""
    arguments = sys.argv[1:] if arguments is None else arguments
    sys.exit(_run(arguments))


def _run(arguments: list[str]) -> int:
    verbose = "-v" in arguments or "--verbose" in arguments
    as_json = "--json" in arguments
    try:
        with interruptible():  # every verb puts its half-made work away, also for SIGTERM
            result: Any = app(arguments, prog_name="paretron", standalone_mode=False)
            if result == _STOPPED:
                raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except ParetronError as error:
        if verbose:
            say_traceback()
        say_problems(error.problems, as_json=as_json)
        return error.exit_code
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "paretron"
        # The formatted message names the option and its closest spelling; str() does not.
        cause = " ".join(getattr(error, "format_message", error.__str__)().split())
        if not cause and not as_json:  # no verb: its help has just been printed
            return Code.USAGE.exit
        problem = Problem(Code.USAGE, cause or "no verb", fix=f"`{command} --help`")
        say_problems([problem], as_json=as_json)
        return Code.USAGE.exit
    except (KeyboardInterrupt, typer.Abort):
        problem = Problem(Code.INTERRUPTED, "stopped on request", fix="the same command again")
        say_problems([problem], as_json=as_json)
        return Code.INTERRUPTED.exit
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone
        return 0
    except OSError as error:
        if error.errno not in _PATH_REFUSED:
            return _bug()
        if verbose:
            say_traceback()
        problem = Problem(
            Code.USAGE,
            str(error.strerror),
            where=str(error.filename)[:200],
            fix="name a path that this user may use",
        )
        say_problems([problem], as_json=as_json)
        return Code.USAGE.exit
    except Exception:
        return _bug()


def _bug() -> int:
    """Something that nobody foresaw: its traceback is what a report needs, its secrets are not."""
    say_traceback()
    print("error: this is a bug in Paretron; report it with the lines above", file=sys.stderr)
    return 1
