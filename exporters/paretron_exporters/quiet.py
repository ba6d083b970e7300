"""Other people's exporters at work: without their prints, and what they raise in one line."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

from paretron.errors import Code, ParetronError, Problem


@contextmanager
def quiet() -> Iterator[None]:
    """Without prints, bars and warnings: what matters of them the gates find."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def told_of(tool: str, *, fix: str) -> Iterator[None]:
    """ENGINE for whatever a tool raises, but for what is the disk's, which `staged` tells."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ParetronError) or (
            isinstance(error, OSError) and error.errno is not None
        ):
            raise
        line = (str(error).splitlines() or [""])[0]
        cause = f"{tool} failed: {type(error).__name__}: {line[:300]}"
        raise ParetronError(Problem(Code.ENGINE, cause, fix=fix)) from error
