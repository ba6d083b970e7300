"""Names for what fixtures give."""

from collections.abc import Callable
from pathlib import Path

PicoMaker = Callable[..., Path]
