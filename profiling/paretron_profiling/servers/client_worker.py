"""The process that puts a server under load and takes the times.

Started as `python -I client_worker.py ANSWER_FD SETTINGS_JSON`, settings `{url, model, min_tokens,
silence_s, scratch}`. Requests come as JSON lines on standard input, answers go as JSON lines to the
file descriptor ANSWER_FD. When standard input closes, whoever started this is gone, and so is this
process, even in the middle of a load.

While the clock runs, a chunk costs a reading of the clock and a list's append: requests are encoded
before, answers are read after, and garbage is not collected.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import platform
import queue
import random
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

from paretron_profiling.servers.client_http import Host, Pieces, read_response

MOST_READY = 256  # connections that are opened before the clock starts
SPIN_S = 1e-3  # what the event loop rounds a sleep up to
REASON_LEN = 200
OK = 200
KEY_VARIABLE = "PARETRON_API_KEY"


@dataclass
class Call:
    """One request: its times on the clock, the bytes that came with the time of each, its end."""

    request: bytes
    sent: float = 0.0
    pieces: Pieces = field(default_factory=list)
    error: str | None = None


@dataclass(frozen=True)
class Answer:
    """What a stream said: when chunks with tokens came, and the server's counts."""

    chunks: tuple[float, ...]
    error: str | None
    output_tokens: int | None
    prompt_tokens: int | None


def arrivals(count: int, *, rate: float, seed: int) -> list[float]:
    """Seconds from the start at which `count` requests of a Poisson process arrive."""
    rng = random.Random(seed)
    return list(accumulate(rng.expovariate(rate) for _ in range(count)))


def events(pieces: Sequence[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """The data of each server-sent event, with the time of the piece that completed its line.

    Data of several lines are several events here; no server of completions sends such.
    """
    rest, last = b"", 0.0
    for last, piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield last, line[5:].strip()
    if rest.startswith(b"data:"):
        yield last, rest[5:].strip()


def read_answer(pieces: Sequence[tuple[float, bytes]]) -> Answer:
    """Parse a stream of completions; ValueError where it is none.

    Some servers end with a chunk that says why and holds no token: where there are more chunks than
    tokens, empty last ones do not count.
    """
    chunks: list[tuple[float, bool]] = []
    usage: dict[str, Any] = {}
    for at, data in events(pieces):
        if data == b"[DONE]":
            break
        said = json.loads(data)
        if not isinstance(said, dict):
            raise ValueError("an event is no object")
        if error := said.get("error"):
            text = error.get("message") if isinstance(error, dict) else error
            return Answer((), f"the server said: {text}", None, None)
        usage = said.get("usage") or usage
        if choices := said.get("choices"):
            chunks.append((at, bool(choices[0].get("text"))))
    tokens = usage.get("completion_tokens")
    while tokens and len(chunks) > tokens and not chunks[-1][1]:
        chunks.pop()
    return Answer(tuple(at for at, _ in chunks), None, tokens, usage.get("prompt_tokens"))


def failure_of(answer: Answer, *, input_len: int, output_len: int) -> str | None:
    """What keeps an answer from counting; None for a whole one."""
    if answer.error:
        return answer.error
    if not answer.chunks:
        return "the stream held no token"
    # Where a server counts nothing, as many chunks as tokens were asked for leave no doubt.
    tokens = len(answer.chunks) if answer.output_tokens is None else answer.output_tokens
    if tokens != output_len:
        counted = "chunks, no count," if answer.output_tokens is None else "tokens"
        return f"{tokens} {counted} of {output_len}"
    if answer.prompt_tokens not in (None, input_len):
        return f"a prompt of {input_len} tokens was taken as {answer.prompt_tokens}"
    return None


def _whole(call: Call, *, input_len: int, output_len: int) -> tuple[tuple[float, ...], str | None]:
    """When the chunks of a call came, and what keeps it from counting."""
    if call.error is not None:
        return (), call.error
    try:
        said = read_response(call.pieces)
        if said.status != OK:
            text = b"".join(part for _, part in said.body).decode(errors="replace")
            return (), f"HTTP {said.status}: {text}"
        if not said.whole:
            return (), "the connection broke in the middle of the answer"
        answer = read_answer(said.body)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        return (), f"the answer is no stream of completions: {error}"
    return answer.chunks, failure_of(answer, input_len=input_len, output_len=output_len)


class Load:
    """A client of one server, its connections kept between loads."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._key = os.environ.get(KEY_VARIABLE)
        self._model, self._min_tokens = settings["model"], settings["min_tokens"]
        self._silence_s = settings["silence_s"]
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._host = Host(settings["url"], headers=headers)

    async def run(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Send prompts [requests][input_len] at a pace and digest what came back."""
        prompts, output_len, mode = asked["prompts"], asked["output_len"], asked["mode"]
        calls = [Call(self._request(p, output_len)) for p in prompts]
        at_once = asked["load"] if mode == "closed" else len(calls)
        await self._host.make_ready(min(int(at_once), len(calls), MOST_READY))
        gc.collect()
        gc.disable()
        try:
            start, busy = time.perf_counter(), time.process_time()
            if mode == "closed":
                waiting = iter(calls)
                await asyncio.gather(*(self._in_turn(waiting) for _ in range(int(asked["load"]))))
            elif mode == "open":
                due = arrivals(len(calls), rate=asked["load"], seed=asked["seed"])
                await asyncio.gather(
                    *(self._at(c, start + d) for c, d in zip(calls, due, strict=True))
                )
            else:
                await asyncio.gather(*map(self._send, calls))
            wall = time.perf_counter() - start
            busy = time.process_time() - busy
        finally:
            gc.enable()
        digested = self._digest(calls, start, len(prompts[0]), output_len)
        return digested | {"busy": busy / wall}

    def _request(self, prompt: list[int], output_len: int) -> bytes:
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": output_len,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        }
        if self._min_tokens:
            body["min_tokens"] = output_len
        return self._host.post("/v1/completions", json.dumps(body).encode())

    async def _in_turn(self, waiting: Iterator[Call]) -> None:
        for call in waiting:
            await self._send(call)

    async def _at(self, call: Call, due: float) -> None:
        """Send at its time, and count from it, whatever kept us."""
        await asyncio.sleep(due - time.perf_counter() - SPIN_S)
        while time.perf_counter() < due:
            await asyncio.sleep(0)
        await self._send(call)
        call.sent = due

    async def _send(self, call: Call) -> None:
        call.sent = time.perf_counter()
        try:
            await self._host.ask(call.request, call.pieces, silence_s=self._silence_s)
        except TimeoutError:
            call.error = f"nothing came for {self._silence_s:g} s"
        except OSError as error:
            call.error = f"{type(error).__name__}: {error.strerror or error}"

    def _digest(
        self, calls: Sequence[Call], start: float, input_len: int, output_len: int
    ) -> dict[str, Any]:
        times: dict[str, list[float]] = {
            "sent_s": [], "first_token_s": [], "finish_s": [], "gaps_s": []
        }  # fmt: skip
        failures = []
        for call in calls:
            chunks, reason = _whole(call, input_len=input_len, output_len=output_len)
            if reason is not None:
                failures.append(self._told(reason))
                continue
            times["sent_s"].append(call.sent - start)
            times["first_token_s"].append(chunks[0] - start)
            times["finish_s"].append(chunks[-1] - start)
            times["gaps_s"] += [b - a for a, b in pairwise(chunks)]
        return {**times, "failures": failures}

    def _told(self, reason: str) -> str:
        """A reason on one line, without the key, should a server have quoted it."""
        if self._key:
            reason = reason.replace(self._key, "***")
        return " ".join(reason.split())[:REASON_LEN]


def read_requests(requests: queue.Queue[dict[str, Any]], scratch: str) -> None:
    """Move lines from standard input to the queue; at its end, end the process."""
    for line in sys.stdin:
        requests.put(json.loads(line))
    shutil.rmtree(scratch, ignore_errors=True)  # who made it may be gone
    os._exit(0)


def main() -> None:
    """Say that it is here, then run loads until standard input closes."""
    answers = os.fdopen(int(sys.argv[1]), "w")
    settings = json.loads(sys.argv[2])
    load = Load(settings)
    requests: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(
        target=read_requests, args=(requests, settings["scratch"]), daemon=True
    ).start()

    def answer(content: object) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    with asyncio.Runner() as runner:
        answer({"client": f"asyncio, Python {platform.python_version()}"})
        while True:
            answer({"sample": runner.run(load.run(requests.get()))})


if __name__ == "__main__":
    main()
