"""Puts a server under load from a process of its own, so that nothing of ours disturbs the clock.

One load is one `Sample`. Streams of `/v1/completions`, prompts as token ids, greedy, the end of
sequence ignored. The clock of a request starts when it is sent (in an open loop: when it was due,
so that a client that falls behind cannot hide a server that does), connections are open before,
and every event of the stream is a chunk.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from paretron.errors import Code, ParetronError, Problem
from paretron_profiling.engines.engine import Pace
from paretron_profiling.engines.environment import clean_environment
from paretron_profiling.engines.worker import Worker, WorkerFailed
from paretron_profiling.schema import BUNDLED, OPEN, Sample

WORKER = Path(__file__).with_name("client_worker.py")
KEY_VARIABLE = "PARETRON_API_KEY"  # sent as a bearer token to the servers that a recipe names
START_TIMEOUT_S = 60.0
SILENCE_S = 600.0  # the longest wait for a first or a further byte of an answer
LOAD_TIMEOUT_S = 6 * 3600.0
MOST_IN_BUNDLES = 0.5  # of the tokens; from there on the usual gap is not that of a token


class LoadClient:
    """A running client of one server."""

    def __init__(self, worker: Worker, about: str, url: str, model: str) -> None:
        self._worker, self._about, self._url, self._model = worker, about, url, model
        self._busiest = 0.0

    @property
    def url(self) -> str:
        """Where the server listens."""
        return self._url

    @property
    def model(self) -> str:
        """The name under which it serves the model."""
        return self._model

    @property
    def pid(self) -> int:
        """The client's process."""
        return self._worker.pid

    @property
    def about(self) -> dict[str, str]:
        """What takes the times, and the largest share of a core that a load has cost it."""
        return {"client": self._about, "client_cpu": f"{self._busiest:.0%} of a core"}

    @property
    def busiest(self) -> float:
        """The largest share of a core that a load has cost; near 1 it is the client we measure."""
        return self._busiest

    def run(self, prompts: Sequence[Sequence[int]], output_len: int, *, pace: Pace) -> Sample:
        """Send prompts [requests][input_len] at a pace, and wait for all answers.

        A request without a whole answer is an entry of the sample's failures. ParetronError(ENGINE)
        when none has one, or the client itself ends.
        """
        asked = {
            "prompts": [list(p) for p in prompts],
            "output_len": output_len,
            "mode": pace.mode,
            "load": pace.load,
            "seed": pace.seed,
        }
        planned_s = len(prompts) / pace.load if pace.mode == OPEN else 0.0
        try:
            said = self._worker.ask(asked, timeout_s=planned_s + LOAD_TIMEOUT_S)["sample"]
        except WorkerFailed as failure:
            raise _client_failed(failure) from failure
        self._busiest = max(self._busiest, said.pop("busy"))
        sample = Sample.from_json(said)
        if not sample.completed:
            raise ParetronError(self._all_failed(sample))
        apart = sample.completed + sum(gap > 0 for gap in sample.gaps_s)
        if 1 - apart / (sample.completed * output_len) >= MOST_IN_BUNDLES:
            return replace(sample, doubts=(BUNDLED,))
        return sample

    def _all_failed(self, sample: Sample) -> Problem:
        reason, count = Counter(sample.failures).most_common(1)[0]
        others = len(sample.failures) - count
        return Problem(
            Code.ENGINE,
            f"all {len(sample.failures)} requests failed: {reason}"
            + (f" ({others} for other reasons)" if others else ""),
            where=self.url,
            fix="the server must run, take prompts as token ids at /v1/completions, stream, and "
            "go on past the end of sequence (ignore_eos)",
        )


@contextmanager
def load_client(
    url: str, *, model: str, send_key: bool = False, min_tokens: bool = False
) -> Iterator[LoadClient]:
    """A client of the model that a server at `url` knows under a name; it ends with the context.

    `send_key`: with the key in the environment variable PARETRON_API_KEY, where it is set.
    `min_tokens`: ask for these too, for servers that know them and not `ignore_eos`.
    """
    settings: dict[str, object] = {
        "url": url,
        "model": model,
        "min_tokens": min_tokens,
        "silence_s": SILENCE_S,
    }
    environment = clean_environment()
    if send_key and (key := os.environ.get(KEY_VARIABLE)):
        environment[KEY_VARIABLE] = key
    with TemporaryDirectory(prefix="paretron-client-", ignore_cleanup_errors=True) as scratch:
        worker = Worker(
            [sys.executable, "-I", str(WORKER)],
            argument=json.dumps(settings | {"scratch": scratch}),
            environment=environment,
            log=Path(scratch) / "client.log",
        )
        try:
            try:
                about = worker.ask(None, timeout_s=START_TIMEOUT_S)["client"]
            except WorkerFailed as failure:
                raise _client_failed(failure) from failure
            yield LoadClient(worker, f"{about}, own process", url, model)
        finally:
            worker.end()


def _client_failed(failure: WorkerFailed) -> ParetronError:
    return ParetronError(
        Problem(
            Code.ENGINE,
            f"the load client {failure}",
            fix="the end of its log above says why; `paretron doctor` looks at the installation",
        )
    )
