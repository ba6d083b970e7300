"""The load client against a server whose delays and faults are known."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import pytest

from paretron.errors import Code, ParetronError
from paretron_profiling.engines.engine import Pace
from paretron_profiling.schema import CLOSED, OFFLINE, OPEN, Sample, Workload
from paretron_profiling.servers import client as client_module
from paretron_profiling.servers.client import LoadClient, load_client
from paretron_profiling.servers.client_http import read_response
from paretron_profiling.servers.client_worker import arrivals, events, failure_of, read_answer
from paretron_profiling.servers.server import free_port
from profiling import sseserver as sse

FIRST_S, GAP_S, TOKENS = 0.1, 0.02, 6
BLUR_S = 0.05  # what a busy machine may add to a median


@dataclass(frozen=True)
class Here:
    """The server's address, its log, and a client of it."""

    url: str
    log: Path
    client: LoadClient

    def logged(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def counts(self) -> dict[str, int]:
        with urllib.request.urlopen(f"{self.url}/connections", timeout=10) as said:
            found: dict[str, int] = json.load(said)
            return found


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    log = tmp_path_factory.mktemp("sse") / "log"
    plan = {"first_s": FIRST_S, "gap_s": GAP_S, "log": str(log)}
    port = free_port()
    command = [sys.executable, sse.__file__, "--port", str(port), "--plan", json.dumps(plan)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(200):
            try:
                urllib.request.urlopen(f"{url}/v1/models", timeout=5).close()
                break
            except OSError:
                time.sleep(0.05)
        with load_client(url, model="test") as client:
            yield Here(url, log, client)
    finally:
        server.kill()
        server.wait()


@pytest.fixture(autouse=True)
def _fresh_log(here: Here) -> None:
    here.log.write_text("")


def prompts(count: int, *, fault: int = 0) -> list[list[int]]:
    return [[fault or 100 + i, 200, 201, 202] for i in range(count)]


def offline(count: int) -> Pace:
    return Pace(OFFLINE, count, 0)


def test_times_are_those_that_the_server_made(here: Here) -> None:
    sample = here.client.run(prompts(8), TOKENS, pace=offline(8))
    assert (sample.completed, sample.failures) == (8, ())
    logged = here.logged()
    work = Workload("x", OFFLINE, 8, 4, TOKENS)
    ttft = median(sample.ttfts_ms(work)) / 1e3
    assert FIRST_S <= ttft < median(r["written"][0] - r["received"] for r in logged) + BLUR_S
    tpot = median(sample.tpots_ms(work)) / 1e3
    theirs = median((r["written"][-1] - r["written"][0]) / (TOKENS - 1) for r in logged)
    assert tpot == pytest.approx(theirs, abs=BLUR_S / TOKENS)
    assert len(sample.gaps_s) == 8 * (TOKENS - 1)
    gaps = [b - a for r in logged for a, b in pairwise(r["written"])]
    assert sum(sample.gaps_s) == pytest.approx(sum(gaps), abs=8 * BLUR_S)
    assert all(
        0 <= a < b <= c
        for a, b, c in zip(sample.sent_s, sample.first_token_s, sample.finish_s, strict=True)
    )


def test_connections_are_open_before_the_clock_and_used_again(here: Here) -> None:
    before = here.counts()["connections"]
    with load_client(here.url, model="test") as client:
        client.run(prompts(5), 2, pace=offline(5))
        assert here.counts()["connections"] == before + 5 + 1  # one asks for the count
        client.run(prompts(5), 2, pace=offline(5))
        assert here.counts()["connections"] == before + 5 + 2


def test_a_closed_loop_keeps_as_many_in_flight(here: Here) -> None:
    sample = here.client.run(prompts(9), TOKENS, pace=Pace(CLOSED, 3, 0))
    assert sample.completed == 9
    ends = sorted([(t, 1) for t in sample.sent_s] + [(t, -1) for t in sample.finish_s])
    flying, most = 0, 0
    for _, step in ends:
        flying += step
        most = max(most, flying)
    assert most == 3
    assert len({round(s, 6) for s in sorted(sample.sent_s)[:3]}) == 3
    assert sum(s < FIRST_S for s in sample.sent_s) == 3


def test_an_open_loop_sends_when_it_is_time_whatever_the_server_does(here: Here) -> None:
    due = arrivals(12, rate=40.0, seed=7)
    with load_client(here.url, model="test") as client:
        sample = client.run(prompts(12), TOKENS, pace=Pace(OPEN, 40.0, 7))
    assert sample.sent_s == pytest.approx(due, abs=1e-9)
    received = sorted(r["received"] for r in here.logged())
    late = [(r - received[0]) - (d - due[0]) for r, d in zip(received, due, strict=True)]
    assert median(map(abs, late)) < BLUR_S
    assert max(due) > FIRST_S  # some are sent when others are answered
    opened = [r["connected"] for r in here.logged()]
    assert max(opened) < received[0]  # no request waits for a connection


def test_arrivals_are_a_poisson_process_by_its_seed() -> None:
    due = arrivals(20_000, rate=5.0, seed=3)
    gaps = [b - a for a, b in pairwise(due)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((g - mean) ** 2 for g in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(0.2, rel=0.03)
    assert deviation == pytest.approx(mean, rel=0.03)  # of an exponential law
    assert due == arrivals(20_000, rate=5.0, seed=3) != arrivals(20_000, rate=5.0, seed=4)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (sse.REFUSED, "HTTP 400: .*prompt refused"),
        (sse.BROKEN, "broke in the middle"),
        (sse.SHORT, f"{TOKENS // 2} tokens of {TOKENS}"),
        (sse.LONG_PROMPT, "a prompt of 4 tokens was taken as 5"),
        (sse.SAID_ERROR, "the server said: out of memory"),
        (sse.NO_SSE, "held no token"),
    ],
)
def test_a_failed_request_is_counted_and_the_others_stand(
    here: Here, fault: int, reason: str
) -> None:
    sample = here.client.run(prompts(2) + prompts(1, fault=fault), TOKENS, pace=offline(3))
    assert sample.completed == 2
    assert len(sample.failures) == 1
    assert re.search(reason, sample.failures[0])


def test_a_silent_server_is_left_after_a_while(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "SILENCE_S", 0.5)
    with load_client(here.url, model="test") as client:
        sample = client.run(prompts(1) + prompts(1, fault=sse.SILENT), TOKENS, pace=offline(2))
    assert sample.completed == 1
    assert sample.failures == ("nothing came for 0.5 s",)


@pytest.mark.parametrize("fault", [sse.UNCOUNTED, sse.EMPTY_END, sse.SPLIT])
def test_odd_streams_that_are_whole(here: Here, fault: int) -> None:
    """Without counts; with an empty chunk long after the last token; in pieces of any cut."""
    sample = here.client.run(prompts(2, fault=fault), TOKENS, pace=offline(2))
    assert (sample.completed, sample.failures) == (2, ())
    assert len(sample.gaps_s) == 2 * (TOKENS - 1)
    assert max(sample.gaps_s) < 8 * GAP_S


def test_chunks_of_several_tokens(here: Here) -> None:
    sample = here.client.run(prompts(1, fault=sse.PAIRS), TOKENS, pace=offline(1))
    assert len(sample.gaps_s) == TOKENS // 2 - 1
    ((tpot),) = sample.tpots_ms(Workload("x", OFFLINE, 1, 4, TOKENS))
    assert tpot == pytest.approx(1e3 * sum(sample.gaps_s) / (TOKENS - 1))
    assert sample.doubts == ("bundled",)
    assert here.client.run(prompts(1), TOKENS, pace=offline(1)).doubts == ()


def test_all_failed_is_an_engine_error(here: Here) -> None:
    with pytest.raises(ParetronError) as caught:
        here.client.run(prompts(3, fault=sse.REFUSED), TOKENS, pace=offline(3))
    problem = caught.value.problems[0]
    assert (problem.code, caught.value.exit_code) == (Code.ENGINE, 4)
    assert problem.cause.startswith("all 3 requests failed: HTTP 400")
    assert "token ids" in problem.fix


def test_nobody_there(here: Here) -> None:
    with (
        load_client(f"http://127.0.0.1:{free_port()}", model="test") as client,
        pytest.raises(ParetronError, match="ConnectionRefusedError") as caught,
    ):
        client.run(prompts(2), TOKENS, pace=offline(2))
    assert caught.value.exit_code == 4


def test_the_key_is_sent_where_it_is_meant_to_be_and_told_nowhere(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARETRON_API_KEY", "canary-of-a-key")
    for send, seen in ((True, "Bearer ***"), (False, 'refused, "')):
        with load_client(here.url, model="test", send_key=send) as client:
            asked = prompts(1) + prompts(1, fault=sse.REFUSED)
            (failure,) = client.run(asked, TOKENS, pace=offline(2)).failures
            assert seen in failure
            assert "canary" not in failure
            environment = psutil.Process(client.pid).environ()
            assert ("PARETRON_API_KEY" in environment) == send


def test_no_secret_of_ours_reaches_the_client(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD"):
        monkeypatch.setenv(name, "canary")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    with load_client(here.url, model="test") as client:
        environment = psutil.Process(client.pid).environ()
    assert "canary" not in environment.values()
    assert environment["TOKENIZERS_PARALLELISM"] == "true"


def test_the_client_says_how_busy_it_was(here: Here) -> None:
    here.client.run(prompts(1), TOKENS, pace=offline(1))
    assert 0 < here.client.busiest < 1
    assert here.client.about["client"].startswith("asyncio")
    assert here.client.about["client_cpu"].endswith("of a core")


def test_the_client_ends_with_its_context_and_its_death_is_told(here: Here) -> None:
    with load_client(here.url, model="test") as client:
        process = psutil.Process(client.pid)
        os.kill(client.pid, 9)
        with pytest.raises(ParetronError, match="load client was killed by signal 9"):
            client.run(prompts(1), TOKENS, pace=offline(1))
    assert not process.is_running()


def test_events_have_the_time_of_the_piece_that_ended_them() -> None:
    pieces = [
        (1.0, b"data: a\n\nda"),
        (2.0, b"ta: b"),
        (3.0, b"\r\n\r\n: ping\n\ndata:c\n"),
        (4.0, b"data: d"),
    ]
    assert list(events(pieces)) == [(1.0, b"a"), (3.0, b"b"), (3.0, b"c"), (4.0, b"d")]


def test_an_answer_is_read_as_it_was_said() -> None:
    def piece(at: float, **content: Any) -> tuple[float, bytes]:
        return at, b"data: " + json.dumps(content).encode() + b"\n\n"

    token, none = [{"text": "a"}], [{"text": ""}]
    usage = {"completion_tokens": 2, "prompt_tokens": 3}
    whole = read_answer(
        [
            piece(1, choices=token),
            piece(2, choices=none),
            piece(3, choices=none),
            piece(4, usage=usage, choices=[]),
        ]
    )
    assert whole.chunks == (1, 2)  # an empty chunk may be a token; one more than tokens is none
    assert failure_of(whole, input_len=3, output_len=2) is None
    assert failure_of(whole, input_len=3, output_len=3) == "2 tokens of 3"
    uncounted = read_answer([piece(1, choices=token)])
    assert failure_of(uncounted, input_len=3, output_len=2) == "1 chunks, no count, of 2"
    with pytest.raises(ValueError, match="Expecting"):
        read_answer([(1.0, b"data: {\n\n")])


def test_the_sample_has_no_tokens_and_survives_json(here: Here) -> None:
    sample = here.client.run(prompts(1), 2, pace=offline(1))
    assert sample.tokens == ()
    assert Sample.from_json(json.loads(json.dumps(sample.to_json()))) == sample


STREAM = (
    b"HTTP/1.1 200 OK\r\nServer: x\r\nTransfer-Encoding: Chunked\r\n\r\n"
    b"5\r\ndata:\r\n9;x=1\r\n 0\r\n\r\n0\r\n\r\n2\r\n\n\n\r\n0\r\n\r\n"
)


def test_an_answer_is_understood_however_it_is_cut() -> None:
    head = STREAM.index(b"\r\n\r\n") + 4
    for size in range(1, len(STREAM) + 1):
        pieces = [(float(i), STREAM[i : i + size]) for i in range(0, len(STREAM), size)]
        said = read_response(pieces)
        assert (said.status, said.form, said.whole, said.keeps) == (200, "chunks", True, True)
        assert b"".join(part for _, part in said.body) == b"data: 0\r\n\r\n0\r\n\n\n"
        if head <= size < len(STREAM) - 2:  # the last line's end says nothing new
            assert not read_response(pieces[:1]).whole


def test_answers_of_other_forms() -> None:
    def said(head: bytes, body: bytes) -> tuple[str, bool, bool]:
        found = read_response([(0.0, b"HTTP/1.1 200 OK\r\n" + head + b"\r\n"), (1.0, body)])
        assert found.body[-1] == (1.0, body)
        return found.form, found.whole, found.keeps

    assert said(b"Content-Length: 3\r\n", b"abc") == ("length", True, True)
    assert said(b"Content-Length: 4\r\n", b"abc") == ("length", False, True)
    assert said(b"Content-Length: 3\r\nConnection: close\r\n", b"abc") == ("length", True, False)
    assert said(b"", b"abc") == ("close", True, False)
    for nonsense in (b"", b"HTTP/1.1 200 OK\r\n", b"SSH-2.0-x\r\n\r\n", b"\r\n\r\n"):
        with pytest.raises(ValueError, match=r"."):
            read_response([(0.0, nonsense)])
