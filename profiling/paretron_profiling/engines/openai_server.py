"""Any OpenAI-compatible server that runs already: SGLang, Triton's front end, llama.cpp's server.

The recipe says where each model is served. A server must stream `/v1/completions`, take prompts as
token ids, and go on past the end of sequence when asked (`ignore_eos` or `min_tokens`); the answer
to a request that it does not take is quoted. Where one wants a key, the environment variable
PARETRON_API_KEY holds it: it is sent to the servers that the recipe names, and written nowhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from paretron.errors import Code, ParetronError, Problem, raise_all
from paretron_profiling.engines.engine import EngineSettings, Limits
from paretron_profiling.schema import CLOSED, OFFLINE, OPEN
from paretron_profiling.servers.client import KEY_VARIABLE, load_client
from paretron_profiling.servers.server import ServerSession

ASK_TIMEOUT_S = 15.0


class OpenAiServer:
    """Asks a server that somebody else started and will stop."""

    name = "openai"
    wants = "hf"
    modes = frozenset({OFFLINE, CLOSED, OPEN})
    session_bytes = 0
    largest_batch: int | None = None

    def check(self, settings: EngineSettings) -> list[Problem]:
        """Whether the recipe says where the models are served; asks none of the servers."""
        where = "profile.engines: openai"
        problems = [
            Problem(
                Code.RECIPE_VALUE,
                f"{key} is for servers that are started here",
                where=f"{where}: {key}",
                fix=f"leave `{key}` out",
            )
            for key, stated in (
                ("python", settings.python), ("dtype", settings.dtype), ("ports", settings.ports),
            )
            if stated
        ]  # fmt: skip
        if not settings.servers:
            problems.append(
                Problem(
                    Code.RECIPE_VALUE,
                    "openai needs to know where each model is served",
                    where=f"{where}: servers",
                    fix="servers: {teacher: http://127.0.0.1:8000, ...}",
                )
            )
        return problems

    @contextmanager
    def open(
        self, model_dir: Path, *, settings: EngineSettings, limits: Limits
    ) -> Iterator[ServerSession]:
        """Ask the one server in `settings` for its model, and keep a client of it.

        ParetronError(ENGINE) when it does not answer, or holds less than the longest request.
        """
        raise_all(self.check(settings))
        if len(settings.servers) != 1:
            raise ValueError("the settings of a session name the server of its model alone")
        url = next(iter(settings.servers.values())).rstrip("/").removesuffix("/v1")
        model = _first_model(url)
        longest = model.get("max_model_len")  # vLLM and SGLang say so
        if isinstance(longest, int) and longest < limits.context_len:
            cause = f"the server takes {longest} tokens a request, not {limits.context_len}"
            fix = f"start it for {limits.context_len}, or state shorter profile.lengths"
            raise ParetronError(Problem(Code.ENGINE, cause, where=url, fix=fix))
        about = {
            "mode": "OpenAI server, not started by us",
            "server": url,
            "served_model": str(model["id"]),
            "owned_by": str(model.get("owned_by", "")),
        }

        def check_alive() -> None:
            _first_model(url)

        with load_client(url, model=model["id"], send_key=True, min_tokens=True) as client:
            yield ServerSession(client, pid=None, about=about, check_alive=check_alive)


def _first_model(url: str) -> Mapping[str, Any]:
    """The entry of the model that a server serves; ParetronError(ENGINE) when it does not say."""
    key = os.environ.get(KEY_VARIABLE)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        said = httpx.get(
            f"{url}/v1/models", headers=headers, timeout=ASK_TIMEOUT_S, trust_env=False
        )
        said.raise_for_status()
        model = said.json()["data"][0]
        if isinstance(model, dict) and isinstance(model.get("id"), str):
            return model
        cause = "its list of models is not one"
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        cause = f"no answer: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    except (ValueError, LookupError, TypeError):
        cause = "it lists no model"
    raise ParetronError(
        Problem(
            Code.ENGINE,
            f"the server at {url}/v1/models: {cause}",
            where="profile.engines: openai: servers",
            fix="start the server, or name the address at which it listens",
        )
    )


ENGINE = OpenAiServer()
