"""A server that is not there, answers nonsense or knows a secret: one line, nothing written."""

from __future__ import annotations

import json
import math
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from makers import PicoMaker
from paretron.artifacts.manifest import Provenance
from paretron.artifacts.models import load_tokenizer
from paretron.cli.main import main
from paretron.data.tokens import build_token_store
from paretron.errors import Code, ParetronError
from paretron.evaluate import endpoint as module
from paretron.evaluate.endpoint import KEY_VARIABLE, connected
from paretron.evaluate.served import ServedAsker
from paretron.evaluate.stage import evaluate_server
from paretron.recipe import Evaluate

SECRET = "very-secret-key-0123456789"
CARD = {"id": "student", "owned_by": "vllm", "max_model_len": 64}
Answer = Callable[[str, dict[str, Any]], tuple[int, Any]]


class Server:
    """A server on this machine that says what a test has it say, and remembers what it heard."""

    def __init__(self) -> None:
        self.models: Any = {"data": [CARD]}
        self.answer: Answer = lambda path, asked: (200, completions(asked))
        self.keys: list[str | None] = []
        self.asked: list[dict[str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._say(200, outer.models)

            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append(asked)
                self._say(*outer.answer(self.path, asked))

            def _say(self, status: int, content: Any) -> None:
                outer.keys.append(self.headers.get("Authorization"))
                raw = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                if status == 302:
                    self.send_header("Location", "http://192.0.2.1/elsewhere")
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, format: str, *arguments: Any) -> None:
                """Nothing on standard error."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.http.shutdown()
    thread.join()
    server.http.server_close()


def completions(asked: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Every token has a probability of a quarter, and another one of a half."""
    choices = []
    for index, row in enumerate(asked["prompt"]):
        names = [f"token_id:{token}" for token in row]
        logprobs = {
            "tokens": names,
            "token_logprobs": [None, *[math.log(0.25)] * (len(row) - 1)],
            "top_logprobs": [
                None, *({name: math.log(0.25), "other": math.log(0.5)} for name in names[1:]),
            ],
        }  # fmt: skip
        choices.append({"index": index, "text": "", "logprobs": logprobs | changes})
    return {"choices": choices[::-1]}  # order is by index, not by place


def read(server: Server, *rows: list[int]) -> Any:
    with connected(server.url) as endpoint:
        return endpoint.read(list(rows))


def problem_of(action: Callable[[], Any]) -> Any:
    with pytest.raises(ParetronError) as caught:
        action()
    (problem,) = caught.value.problems
    assert "\n" not in problem.cause
    return problem


def test_what_a_server_says_of_tokens(server: Server) -> None:
    found = read(server, [5, 6, 7], [8, 9])
    assert [len(row) for row in found] == [2, 1]
    assert found[0][0].nats == pytest.approx(math.log(0.25))
    assert found[0][0].likeliest is False
    (asked,) = server.asked
    assert asked["prompt"] == [[5, 6, 7], [8, 9]]
    assert (asked["echo"], asked["logprobs"], asked["model"]) == (True, 1, "student")


def test_only_the_scored_end_of_a_row_counts(server: Server) -> None:
    with connected(server.url) as endpoint:
        nats = endpoint.nats([torch.arange(3, 10), torch.arange(3, 6)], [4, 2])
    assert nats == pytest.approx([4 * math.log(4), 2 * math.log(4)])


def test_a_prompt_that_is_drawn_again_gets_another_seed(server: Server, pico: PicoMaker) -> None:
    """By one seed a server draws the same text, so that twenty samples would be one."""

    def answer(path: str, asked: dict[str, Any]) -> tuple[int, Any]:
        texts = [f"{row[0]} by {asked['seed']}" for row in asked["prompt"]]
        return 200, {"choices": [{"index": i, "text": text} for i, text in enumerate(texts)]}

    server.answer = answer
    tokenizer = load_tokenizer(pico())
    with connected(server.url) as endpoint:
        asker = ServedAsker(endpoint, tokenizer, 2, lambda kind, fields: None)
        found = asker.generate(
            [[7], [7], [8], [7], [9], [8]], max_tokens=4, until=[], temperature=0.2, top_p=0.95
        )
    seeds = [text.split(" by ") for text in found]
    assert [token for token, _ in seeds] == ["7", "7", "8", "7", "9", "8"]
    assert len({seed for token, seed in seeds if token == "7"}) == 3
    assert len({seed for token, seed in seeds if token == "8"}) == 2
    assert [len(asked["prompt"]) for asked in server.asked] == [2, 1, 2, 1]


def test_a_server_that_cannot_name_tokens_by_id_is_not_asked_to(server: Server) -> None:
    server.models = {"data": [CARD | {"owned_by": "someone", "max_model_len": None}]}
    words = ["a", "b", "c"]
    server.answer = lambda path, asked: (200, completions(asked, tokens=words))
    assert len(read(server, [5, 6, 7])[0]) == 2
    assert "return_tokens_as_token_ids" not in server.asked[0]


ROWS: dict[str, tuple[Answer, Code, str]] = {
    "an error": (lambda p, a: (500, {"error": "out\nof luck"}), Code.ENGINE, "answers 500"),
    "not found": (lambda p, a: (404, b"<html>no</html>"), Code.ENGINE, "answers 404"),
    "elsewhere": (lambda p, a: (302, b""), Code.ENGINE, "answers 302"),
    "no JSON": (lambda p, a: (200, b"hello"), Code.ENGINE, "not JSON: hello"),
    "deep JSON": (lambda p, a: (200, b"[" * 100_000), Code.ENGINE, "not JSON"),
    "a list": (lambda p, a: (200, []), Code.ENGINE, "not a JSON object"),
    "no choices": (lambda p, a: (200, {"choices": None}), Code.ENGINE, "no list of choices"),
    "fewer": (lambda p, a: (200, {"choices": []}), Code.ENGINE, "0 choices to 1 prompts"),
    "no logprobs": (
        lambda p, a: (200, {"choices": [{"index": 0, "text": "x", "logprobs": None}]}),
        Code.ENGINE, "no log-probabilities of the prompt's tokens",
    ),
    "of what it wrote": (
        lambda p, a: (200, completions(a, tokens=["x"], token_logprobs=[-1], top_logprobs=[{}])),
        Code.ENGINE, "of 1 of the prompt's 3",
    ),
    "other tokens": (
        lambda p, a: (200, completions(a, tokens=["token_id:5", "token_id:9", "token_id:7"])),
        Code.ENGINE, "other tokens than were sent",
    ),
    "null": (
        lambda p, a: (200, completions(a, token_logprobs=[None, None, -1.0])),
        Code.ENGINE, "without a log-probability",
    ),
    "above one": (
        lambda p, a: (200, completions(a, token_logprobs=[None, 3.0, -1.0])),
        Code.ENGINE, "a log-probability of 3.0",
    ),
    "NaN": (
        lambda p, a: (200, completions(a, token_logprobs=[None, math.nan, -1.0])),
        Code.GATE_NONFINITE, "no number",
    ),
    # As vLLM 0.32 answers when it computed NaN.
    "a number that JSON has not": (
        lambda p, a: (400, {"error": {
            "message": "Out of range float values are not JSON compliant"}}),
        Code.GATE_NONFINITE, "JSON cannot hold",
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_an_answer_that_is_none_is_said_in_one_line(row: str, server: Server) -> None:
    server.answer, code, said = ROWS[row]
    problem = problem_of(lambda: read(server, [5, 6, 7]))
    assert problem.code is code
    assert said in problem.cause
    assert server.url in problem.where


def test_an_endless_answer_is_not_read_to_its_end(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ANSWER_BYTES", 1000)
    server.answer = lambda path, asked: (200, b" " * 1_000_000)
    assert "more than" in problem_of(lambda: read(server, [5, 6])).cause


def test_a_server_that_is_silent(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        problem = problem_of(lambda: connected(url).__enter__())
    assert problem.code is Code.ENGINE
    assert "ReadTimeout" in problem.cause


def test_no_server_is_there(pico: PicoMaker, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    problem = problem_of(lambda: connected(url).__enter__())
    assert (problem.code, problem.where) == (Code.ENGINE, f"{url}/v1/models")
    assert problem.code.exit == 4


@pytest.mark.parametrize(
    ("models", "name", "said"),
    [
        ({"data": [CARD, CARD | {"id": "other"}]}, None, "several models"),
        ({"data": [CARD]}, "teacher", "it serves no teacher"),
        ({"data": []}, None, "names no model"),
        ({"data": [{"id": 3}, "x", None]}, None, "names no model"),
        ({}, "student", "names no model"),
    ],
)
def test_which_model_is_meant(models: Any, name: str | None, said: str, server: Server) -> None:
    server.models = models
    problem = problem_of(lambda: connected(server.url, model=name).__enter__())
    assert problem.code is Code.ENGINE
    assert said in problem.cause
    assert "--served-name" in problem.fix


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("ftp://127.0.0.1", Code.USAGE),
        ("127.0.0.1:8000", Code.USAGE),
        ("http://", Code.USAGE),
        ("http://user:password@127.0.0.1", Code.USAGE),
        ("http://127.0.0.1/v1?key=x", Code.USAGE),
        ("http://127.0.0.1\n", Code.USAGE),
        ("http://192.0.2.1:8000", Code.INPUT_OFFLINE),
        ("https://example.com/v1", Code.INPUT_OFFLINE),
        ("http://127.0.0.1.example.com", Code.INPUT_OFFLINE),
    ],
)
def test_an_address_that_is_none_or_elsewhere(url: str, code: Code) -> None:
    problem = problem_of(lambda: connected(url, offline=True).__enter__())
    assert problem.code is code
    assert "password@" not in str(problem)


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/"])
def test_an_address_with_or_without_its_version(path: str, server: Server) -> None:
    with connected(server.url + path, offline=True) as endpoint:
        assert endpoint.url == f"{server.url}/v1"


def test_proxies_are_not_for_this_machine(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    assert len(read(server, [5, 6])) == 1


def test_a_key_is_sent_and_kept_nowhere(
    server: Server, pico: PicoMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, SECRET)
    model = pico(num_hidden_layers=1)
    store = build_token_store(
        ["the cat sat"], load_tokenizer(model), tmp_path / "s", eos_token_id=1
    )
    with connected(server.url) as endpoint:
        evaluate_server(
            endpoint, {"validation": (store.folder, 4)}, tokenizer=model, settings=Evaluate(),
            out=tmp_path / "out", provenance=Provenance("evaluation"),
            on_event=lambda kind, fields: None,
        )  # fmt: skip
        server.answer = lambda path, asked: (401, {"error": f"wrong key {SECRET}"})
        problem = problem_of(lambda: endpoint.read([[5, 6]]))
    assert set(server.keys) == {f"Bearer {SECRET}"}
    assert "wrong key ***" in problem.cause
    assert SECRET not in repr(endpoint)
    written = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(written) == 3
    assert not any(SECRET.encode() in content for content in written)


def test_what_has_no_chance_is_no_finite_loss(
    server: Server, pico: PicoMaker, tmp_path: Path
) -> None:
    """As vLLM writes minus infinity, which must not become a large but finite mean."""

    def answer(path: str, asked: dict[str, Any]) -> tuple[int, Any]:
        rest = len(asked["prompt"][0]) - 2
        return 200, completions(asked, token_logprobs=[None, -9999.0, *[-0.1] * rest])

    server.answer = answer
    server.models = {"data": [CARD | {"max_model_len": 500}]}
    model = pico(num_hidden_layers=1)
    text = "the cat sat on the mat " * 9
    store = build_token_store([text], load_tokenizer(model), tmp_path / "s", eos_token_id=1)
    with connected(server.url) as endpoint:
        problem = problem_of(lambda: evaluate_server(
            endpoint, {"validation": (store.folder, store.num_tokens)}, tokenizer=model,
            settings=Evaluate(), out=tmp_path / "out", provenance=Provenance("evaluation"),
            on_event=lambda kind, fields: None,
        ))  # fmt: skip
    assert problem.code is Code.GATE_NONFINITE
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--engine", "vllm_server=/no/python", "--server", "http://127.0.0.1"], "--engine"),
        (["--engine", "Vllm!"], "no engine has the name 'Vllm!'"),
        (["--engine", "nothing"], "nothing"),
        (["--engine", "transformers"], "not asked over HTTP"),
    ],
)
def test_an_engine_that_cannot_be_asked_is_refused(
    options: list[str],
    said: str,
    pico: PicoMaker,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["eval", str(pico()), "--tasks", "x", *options, "--out", str(tmp_path / "o")])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_a_name_without_a_server_is_refused(
    pico: PicoMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "eval",
                str(pico()),
                "--tasks",
                "x",
                "--served-name",
                "y",
                "--out",
                str(tmp_path / "o"),
            ]
        )
    assert ended.value.code == 2
    assert "--served-name" in capsys.readouterr().err
