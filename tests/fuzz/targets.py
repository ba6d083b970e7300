"""What is fuzzed: everything that reads a model's folder, and everything that reads a recipe.

A case is a success or a ParetronError with a cause and a fix, within two seconds and 300 MB.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

from ruamel.yaml import YAML

from fuzz.mutations import damage_model, damage_recipe, odd_override
from paretron.artifacts.companions import write_companions
from paretron.artifacts.config import servable_config
from paretron.artifacts.manifest import identify
from paretron.artifacts.models import load_tokenizer
from paretron.artifacts.reader import Checkpoint
from paretron.artifacts.tokenizer import tokenizer_problems
from paretron.errors import Code, ParetronError, raise_all
from paretron.families import expected_tensors, sizes
from paretron.families.table import with_sizes
from paretron.plan.plan import make_plan
from paretron.recipe import load_recipe

MAX_CPU_S = 2.0
MAX_WAIT_S = 30.0  # by the clock: only what blocks takes that long, however busy the machine is
MAX_GROWTH_KB = 300_000
ACCEPTED = "accepted"
REPOSITORY = Path(__file__).parents[2]


class TooSlow(BaseException):
    """A case took longer than it may; no code under test catches this."""


@dataclass(frozen=True)
class Result:
    """How a case ended: `accepted`, an error's code, or what went wrong."""

    outcome: str
    seconds: float
    growth_kb: int
    failure: str = ""


Case = Callable[[Random, Path], None]


def run_case(case: Case, random: Random, scratch: Path) -> Result:
    """Run one case in a fresh folder below `scratch`."""
    before_kb, start = memory_kb("VmRSS"), time.process_time()
    outcome, failure = ACCEPTED, ""
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        try:
            with in_time():
                case(random, Path(name))
        except ParetronError as error:
            outcome = error.problems[0].code.value
            failure = wrong_with(error)
        except TooSlow:
            failure = f"more than {MAX_CPU_S} s of computing, or blocked for {MAX_WAIT_S} s"
        except (Exception, SystemExit) as error:
            failure = f"{type(error).__name__}: {error}"[:300] + _place(error)
    seconds = time.process_time() - start
    growth_kb = memory_kb("VmHWM") - before_kb if memory_kb("VmHWM") > before_kb else 0
    return Result(outcome, seconds, growth_kb, failure)


def wrong_with(error: ParetronError) -> str:
    """What a refusal lacks."""
    for problem in error.problems:
        if not isinstance(problem.code, Code) or not problem.cause or not problem.fix:
            return f"no cause or no fix: {problem}"
        if not all(text.isprintable() for text in (problem.cause, problem.where, problem.fix)):
            return f"not one line of text: {problem!r}"
    return ""


def _place(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code if trace is not None else None
    return f" ({Path(code.co_filename).name}:{trace.tb_lineno})" if code and trace else ""


@contextmanager
def in_time() -> Iterator[None]:
    """Raise TooSlow in the main thread when the limits are over, even out of a call that blocks."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise TooSlow

    limits = (
        (signal.SIGPROF, signal.ITIMER_PROF, MAX_CPU_S),
        (signal.SIGALRM, signal.ITIMER_REAL, MAX_WAIT_S),
    )
    before = [signal.signal(number, ring) for number, _, _ in limits]
    for _, timer, seconds in limits:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for (number, timer, _), handler in zip(limits, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


def memory_kb(which: str) -> int:
    """A figure of this process: VmRSS, or VmHWM for the most there ever was."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(which))


def model_case(bases: list[Path]) -> Case:
    """Damage one of these checkpoints and read it with all that reads one."""

    def run(random: Random, place: Path) -> None:
        folder = Path(shutil.copytree(random.choice(bases), place / "model"))
        os.chdir(place)  # a socket's path must be short
        try:
            damage_model(folder, random)
        finally:
            os.chdir("/")
        read_model(folder, tokenizer_too=random.random() < 0.1)

    return run


def read_model(folder: Path, *, tokenizer_too: bool) -> None:
    """Open a checkpoint, read all of it, and cut its config to fewer layers."""
    checkpoint = Checkpoint.open(folder)
    config, family = checkpoint.config, checkpoint.family
    raise_all(tokenizer_problems(folder, vocab=config["vocab_size"]))
    size = sizes(family, config)
    out = folder.parent / "out"
    out.mkdir()
    write_companions(out, config=servable_config(config, dtype="bfloat16"), source=folder)
    kept = tuple(range(size["layers"] - 1)) or (0,)
    smaller = with_sizes(family, config, size | {"layers": len(kept)}, kept_layers=kept)
    expected_tensors(family, servable_config(smaller, dtype="float32"))
    for name in checkpoint.entries:
        checkpoint.read(name)
    identify(folder)
    if tokenizer_too:
        load_tokenizer(folder)


def recipe_case() -> Case:
    """Damage a shipped recipe and load it, with overrides; some are planned as well."""
    texts = recipe_texts()
    contents = [YAML(typ="safe", pure=True).load(text) for text in texts]
    keys = recipe_keys()

    def run(random: Random, place: Path) -> None:
        path = place / "recipe.yaml"
        chosen = random.randrange(len(texts))
        damaged = damage_recipe(texts[chosen], contents[chosen], random)
        path.write_text(damaged, "utf-8", "surrogatepass")
        overrides = [odd_override(keys, random) for _ in range(random.choice((0, 0, 1, 2)))]
        recipe = load_recipe(path, overrides=overrides)
        if random.random() < 0.3:
            raise_all(make_plan(recipe, out=place / "out", offline=True).problems)

    return run


def recipe_texts() -> list[str]:
    """Every recipe that ships."""
    return [p.read_text("utf-8") for p in sorted((REPOSITORY / "recipes").rglob("*.yaml"))]


def recipe_keys() -> list[str]:
    """Every dotted key of the shipped recipes, resolved."""

    def below(node: Any, at: str) -> Iterator[str]:
        children: Mapping[Any, Any] = {}
        if isinstance(node, dict):
            children = node
        elif isinstance(node, list | tuple):
            children = dict(enumerate(node))
        for key, value in children.items():
            path = f"{at}.{key}" if at else str(key)
            yield path
            yield from below(value, path)

    found: set[str] = set()
    for path in (REPOSITORY / "recipes").rglob("*.yaml"):
        found |= set(below(load_recipe(path).model_dump(mode="json", by_alias=True), ""))
    return sorted(found)
