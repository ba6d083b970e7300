"""A server that says how likely it finds given tokens, so that what is served is what is judged.

Any server with OpenAI's completions that takes prompts of token ids and, asked to `echo` them with
`logprobs`, gives the log-probability of each one after those before it; vLLM and SGLang do. The
network is used because the user named the address, and offline only this machine's own.
"""

from __future__ import annotations

import ipaddress
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import torch

from paretron.data.answers import Tokens
from paretron.errors import Code, ParetronError, Problem

KEY_VARIABLE = "PARETRON_API_KEY"  # sent as a bearer token, and written nowhere
_VLLM = "vllm"  # as `owned_by` has it: a server that can name tokens by their ids
_NO_CHANCE = -9999.0  # what vLLM writes for minus infinity, which JSON has not
_NO_NUMBER = "not JSON compliant"  # what it, and whatever else Python encodes, says of NaN
_CONNECT_S, _ANSWER_S = 10.0, 600.0
_ANSWER_BYTES, _TOKEN_BYTES = 1 << 20, 1 << 12  # of an answer: at most so much, and a token's share
_QUOTED = 300  # characters of what a server says


@dataclass(frozen=True)
class Scored:
    """A token's log-probability in nats after those before it, and whether none has a higher."""

    nats: float
    likeliest: bool


@dataclass(frozen=True)
class Endpoint:
    """A model behind a server.

    `context`, where the server says it, counts what is read and what is written; a server wants
    room for one token even where none is asked for. `by_id`: tokens are named by their ids.
    """

    http: httpx.Client
    url: str
    model: str
    context: int | None
    by_id: bool

    def nats(self, rows: Sequence[torch.Tensor], scored: Sequence[int]) -> list[float]:
        """Of each row of token ids, int64 [length], the sum of -log p over its last `scored`."""
        answers = self.read([row.tolist() for row in rows])
        return [
            -math.fsum(-math.inf if s.nats <= _NO_CHANCE else s.nats for s in answer[-last:])
            for answer, last in zip(answers, scored, strict=True)
        ]

    def read(self, rows: Sequence[Tokens]) -> list[list[Scored]]:
        """Every token of every row but its first.

        Errors: RECIPE_VALUE (a row longer than the server's context), ENGINE, GATE_NONFINITE.
        """
        longest = max(map(len, rows))
        if self.context is not None and longest >= self.context:
            cause = f"{longest} tokens and one of room, but it is served with {self.context}"
            fix = f"a seq_len of at most {self.context - 1}, or serve it with a longer context"
            raise ParetronError(Problem(Code.RECIPE_VALUE, cause, where=self.url, fix=fix))
        ids = {"return_tokens_as_token_ids": True} if self.by_id else {}
        asked = {"max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0} | ids
        return [
            self._scores(choice, row)
            for choice, row in zip(self._choices(rows, asked), rows, strict=True)
        ]

    def write(self, prompts: Sequence[Tokens], settings: Mapping[str, Any]) -> list[str]:
        """A text after each prompt; `settings` are keys of a completion request."""
        texts = [choice.get("text") for choice in self._choices(prompts, settings)]
        if not all(isinstance(text, str) for text in texts):
            raise self._odd("a choice without text")
        return [str(text) for text in texts]

    def _choices(self, prompts: Sequence[Tokens], settings: Mapping[str, Any]) -> list[Any]:
        """What the server answers to each prompt, in their order."""
        room = _ANSWER_BYTES + _TOKEN_BYTES * sum(map(len, prompts))
        room += _TOKEN_BYTES * int(settings["max_tokens"]) * len(prompts)
        body = {"model": self.model, "prompt": [list(map(int, p)) for p in prompts], **settings}
        answer = _asked(self.http, "POST", f"{self.url}/completions", body=body, room=room)
        try:
            choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
            numbers = [int(choice["index"]) for choice in choices]
        except (KeyError, TypeError, ValueError) as error:
            raise self._odd("no list of choices") from error
        if numbers != list(range(len(prompts))):
            raise self._odd(f"{len(numbers)} choices to {len(prompts)} prompts")
        return choices

    def _scores(self, choice: Mapping[str, Any], row: Tokens) -> list[Scored]:
        try:
            found = choice["logprobs"]
            own, top = (list(found[key])[: len(row)] for key in ("token_logprobs", "top_logprobs"))
            said = list(found["tokens"])[: len(row)]
        except (KeyError, TypeError) as error:
            raise self._odd("no log-probabilities of the prompt's tokens") from error
        if not len(own) == len(top) == len(said) == len(row):
            raise self._odd(f"log-probabilities of {len(own)} of the prompt's {len(row)} tokens")
        if self.by_id and said != [f"token_id:{int(token)}" for token in row]:
            raise self._odd("log-probabilities of other tokens than were sent")
        return [self._score(*pair) for pair in zip(own[1:], top[1:], strict=True)]

    def _score(self, own: Any, top: Any) -> Scored:
        try:
            nats, best = float(own), max(map(float, top.values()))
        except (AttributeError, TypeError, ValueError) as error:
            raise self._odd("a token of the prompt without a log-probability") from error
        if math.isnan(nats) or math.isnan(best):
            raise _not_finite(f"{self.model} gives a log-probability that is no number", self.url)
        if nats > 1e-3:  # no probability is above 1
            raise self._odd(f"a log-probability of {nats}")
        return Scored(nats, nats >= best)

    def _odd(self, cause: str) -> ParetronError:
        fix = "a server whose completions echo a prompt of token ids with logprobs, such as vLLM"
        return ParetronError(
            Problem(Code.ENGINE, f"the server answers with {cause}", where=self.url, fix=fix)
        )


@contextmanager
def connected(url: str, *, model: str | None = None, offline: bool = False) -> Iterator[Endpoint]:
    """The model that a server has at `url`, by its name there; the only one when left out.

    With the key in the environment variable PARETRON_API_KEY, where it is set. Errors: USAGE,
    INPUT_OFFLINE (offline, and the address is not this machine's), ENGINE.
    """
    base, here = _address(url)
    if offline and not here:
        fix = "a server on this machine, or without --offline"
        cause = "another machine is not asked with --offline"
        raise ParetronError(Problem(Code.INPUT_OFFLINE, cause, where=base, fix=fix))
    key = os.environ.get(KEY_VARIABLE)
    timeout = httpx.Timeout(_ANSWER_S, connect=_CONNECT_S)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    # Proxies of the environment are for other machines.
    with httpx.Client(headers=headers, timeout=timeout, trust_env=not here) as http:
        card = _card(_asked(http, "GET", f"{base}/models"), model, base)
        context = card.get("max_model_len")
        yield Endpoint(
            http,
            base,
            card["id"],
            context if isinstance(context, int) and context > 0 else None,
            card.get("owned_by") == _VLLM,
        )


def _address(url: str) -> tuple[str, bool]:
    """The address that paths are appended to, and whether it is this machine's own."""
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError) as error:
        raise _misspelt(str(error)) from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise _misspelt("not an http address")
    if parsed.userinfo or parsed.query or parsed.fragment:
        raise _misspelt(f"no name, password or query belongs there; a key goes into {KEY_VARIABLE}")
    try:
        here = ipaddress.ip_address(parsed.host).is_loopback
    except ValueError:
        here = parsed.host == "localhost"
    text = str(parsed).rstrip("/")
    return text if parsed.path.strip("/") else f"{text}/v1", here


def _card(found: Mapping[str, Any], model: str | None, where: str) -> Mapping[str, Any]:
    """What a server says of one of its models."""
    cards = found.get("data")
    named = {
        card["id"]: card
        for card in (cards if isinstance(cards, list) else [])
        if isinstance(card, dict) and isinstance(card.get("id"), str)
    }
    if model is None and len(named) == 1:
        (model,) = named
    if model not in named:
        known = ", ".join(sorted(named)) or "none"
        cause = "it serves several models" if model is None and named else f"it serves no {model}"
        if not named:
            cause = "the server names no model"
        fix = f"--served-name: {known}"
        raise ParetronError(Problem(Code.ENGINE, cause, where=where, fix=fix))
    card: Mapping[str, Any] = named[str(model)]
    return card


def _asked(
    http: httpx.Client, method: str, url: str, *, body: object = None, room: int = _ANSWER_BYTES
) -> dict[str, Any]:
    """The object that a server answers with; ENGINE for anything else, in one line."""
    content = bytearray()
    try:
        with http.stream(method, url, json=body) as response:
            for part in response.iter_bytes():
                content += part
                if len(content) > room:
                    raise _failed(f"an answer of more than {room} bytes", url)
    except httpx.TimeoutException as error:
        raise _failed(f"no answer in {_ANSWER_S:.0f} s ({type(error).__name__})", url) from error
    except httpx.HTTPError as error:
        raise _failed(f"{type(error).__name__}: {error}", url) from error
    if response.status_code != httpx.codes.OK:
        said = _said(content, http.headers.get("Authorization"))
        if _NO_NUMBER in said:
            raise _not_finite("the server has a number that JSON cannot hold", url)
        raise _failed(f"the server answers {response.status_code}: {said}", url)
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _failed(f"not JSON: {_said(content, None)}", url) from error
    if not isinstance(answer, dict):
        raise _failed("not a JSON object", url)
    return answer


def _said(content: bytearray, authorization: str | None) -> str:
    """The beginning of a server's own words, without a key that they may repeat."""
    text = " ".join(content.decode("utf-8", "replace").split())
    if authorization:
        text = text.replace(authorization.removeprefix("Bearer "), "***")
    return text[:_QUOTED]


def _not_finite(cause: str, where: str) -> ParetronError:
    fix = "use a checkpoint whose training did not diverge, or a wider dtype"
    return ParetronError(Problem(Code.GATE_NONFINITE, cause, where=where, fix=fix))


def _failed(cause: str, url: str) -> ParetronError:
    fix = "is the server up and healthy, and the address right?"
    return ParetronError(Problem(Code.ENGINE, cause, where=url, fix=fix))


def _misspelt(cause: str) -> ParetronError:
    fix = "as in http://127.0.0.1:8000"
    return ParetronError(Problem(Code.USAGE, cause, where="--server", fix=fix))
