"""A model behind a server that an engine starts, for whoever wants to ask it something else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from paretron.artifacts.jsonfile import read_object
from paretron.errors import Code, ParetronError, Problem, raise_all
from paretron.families import explicit, family_of
from paretron.plan.cost import model_facts
from paretron.plugins import ENGINES, find_plugin
from paretron.recipe import Engine as EngineSettings
from paretron_profiling.engines.engine import Limits
from paretron_profiling.schema import CLOSED
from paretron_profiling.servers.server import ServerSession


@contextmanager
def serving(
    folder: Path, *, settings: EngineSettings, batch: int, tokens: int
) -> Iterator[tuple[str, str, dict[str, str]]]:
    """A server of the model in `folder`: address, the model's name there, what it runs with.

    For `batch` requests at once, each of `tokens` tokens read and written, or as many as the
    model's context holds. Its processes end with the context. Errors: RECIPE_VALUE (no such
    engine, or one that is no server), ENGINE, and those of the engine's check.
    """
    engine = find_plugin(ENGINES, settings.name, where="--engine")
    if CLOSED not in engine.modes:
        cause, fix = f"{settings.name} is not asked over HTTP", "vllm_server=PYTHON"
        raise ParetronError(Problem(Code.RECIPE_VALUE, cause, where="--engine", fix=fix))
    raise_all(engine.check(settings))
    found = read_object(folder / "config.json", code=Code.INPUT_CONFIG)
    config = explicit(family_of(found), found)
    context = min(tokens, int(config.get("max_position_embeddings") or tokens))
    # Engines reserve twice of this, so that one which computes in float32 has room, too.
    each = model_facts(config, dtype="BF16").kv_bytes_per_token
    limits = Limits(batch=batch, context_len=context, kv_bytes=batch * context * each)
    with engine.open(folder, settings=settings, limits=limits) as session:
        if not isinstance(session, ServerSession):
            cause = f"{settings.name} does not say where it serves"
            raise ParetronError(Problem(Code.ENGINE, cause, where="--engine", fix="--server URL"))
        runs_with = {k: v for k, v in session.about.items() if not k.startswith("client")}
        yield session.url, session.model, {"engine": settings.name, **runs_with}
