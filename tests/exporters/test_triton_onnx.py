"""A Triton repository's own model.py, in its own process, gives transformers' greedy tokens."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from paretron.artifacts.manifest import Provenance
from paretron.artifacts.models import load_model
from paretron.recipe import Export
from paretron_exporters.triton import EXPORTER
from pico import make_pico

pytest.importorskip("tritonclient.grpc")
pytest.importorskip("onnxruntime_genai")

HERE = Path(__file__).parent
PROMPTS = ("the cat sat on the mat", "def main(self):", "zürich – 東京", "a")
STEPS = 24


@dataclass(frozen=True)
class Expected:
    """Greedy tokens by transformers, and their text."""

    ids: list[int]
    text: str


@dataclass(frozen=True)
class Server:
    """A running stand-in for Triton, with its repository and what transformers says."""

    repository: Path
    http: int
    grpc: int
    expected: dict[str, Expected]

    def generate(self, prompt: str, *, way: str = "generate", **parameters: Any) -> Any:
        """Status and body of one request over HTTP; events are parsed."""
        body = json.dumps({"text_input": prompt, "parameters": parameters}).encode()
        url = f"http://127.0.0.1:{self.http}/v2/models/llm/{way}"
        try:
            with urllib.request.urlopen(urllib.request.Request(url, body)) as response:
                text = response.read().decode()
        except urllib.error.HTTPError as error:
            return json.load(error)
        if way == "generate":
            return json.loads(text)
        return [json.loads(e.removeprefix("data: ")) for e in text.split("\n\n") if e]

    def client(self, transport: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run one of the repository's own clients."""
        url = f"http://127.0.0.1:{self.http}" if transport == "http" else f"127.0.0.1:{self.grpc}"
        return subprocess.run(
            [sys.executable, str(self.repository / f"client_{transport}.py"), "--url", url,
             *arguments],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("triton")
    source = make_pico(folder / "model", "llama", num_hidden_layers=2)
    expected = {prompt: greedy(source, prompt) for prompt in PROMPTS}
    EXPORTER.export(
        source,
        export=Export.model_validate({
            "to": "triton", "backend": "onnx",
            "serving": {"max_seq_len": 128, "max_batch_size": 3},
        }),
        out=folder / "made",
        provenance=Provenance(kind="export"),
        on_event=lambda kind, fields: None,
    )  # fmt: skip
    # It must survive being moved.
    repository = (folder / "made").rename(folder / "elsewhere")
    process = subprocess.Popen(
        [sys.executable, str(HERE / "triton_server_worker.py"), str(repository)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    ports = json.loads(process.stdout.readline())
    yield Server(repository, ports["http"], ports["grpc"], expected)
    said, _ = process.communicate(timeout=60)
    assert said == "finalized\n"


def greedy(folder: Path, prompt: str, steps: int = STEPS) -> Expected:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = load_model(folder).generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=steps
    )
    new = [int(t) for t in out[0, ids.shape[1] :]]
    return Expected(new, tokenizer.decode(new, skip_special_tokens=True))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_tokens_and_text_are_those_of_transformers(server: Server, prompt: str) -> None:
    expected = server.expected[prompt]
    whole = server.generate(prompt, max_tokens=STEPS, exclude_input_in_output=True)
    assert whole["token_ids"] == expected.ids
    assert whole["text_output"] == expected.text
    assert whole["finish_reason"] == "length"
    parts = server.generate(prompt, way="generate_stream", max_tokens=STEPS, stream=True)
    assert [p["token_ids"] for p in parts] == expected.ids
    assert "".join(p["text_output"] for p in parts) == expected.text
    assert [p["finish_reason"] for p in parts] == [""] * (STEPS - 1) + ["length"]


def test_a_stream_that_ends_within_a_character_says_its_rest(server: Server) -> None:
    tokenizer = Tokenizer.from_file(str(server.repository / "llm/1/weights/tokenizer.json"))
    texts = {
        (prompt, n): tokenizer.decode(expected.ids[:n])
        for prompt, expected in server.expected.items()
        for n in range(1, STEPS)
    }
    cut = [(*case, text) for case, text in texts.items() if text.endswith("\ufffd")]
    assert cut, "choose other prompts: none of their answers is cut within a character"
    for prompt, n, text in cut[:3]:
        parts = server.generate(prompt, way="generate_stream", max_tokens=n, stream=True)
        assert "".join(p["text_output"] for p in parts) == text


def test_the_prompt_comes_first_where_nobody_excludes_it(server: Server) -> None:
    answer = server.generate(PROMPTS[0], max_tokens=STEPS)
    assert answer["text_output"] == PROMPTS[0] + server.expected[PROMPTS[0]].text


def test_more_requests_than_sessions_at_once_get_each_its_own(server: Server) -> None:
    asked = PROMPTS * 2
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = pool.map(lambda p: server.generate(p, max_tokens=STEPS), asked)
        assert [a["token_ids"] for a in answers] == [server.expected[p].ids for p in asked]


def test_sampling_follows_its_seed(server: Server) -> None:
    def sampled(seed: int, **more: Any) -> list[int]:
        asked = {"max_tokens": 12, "temperature": 1.5, "seed": seed} | more
        return list(server.generate(PROMPTS[0], **asked)["token_ids"])

    found = [sampled(seed) for seed in (1, 2, 3)]
    assert found[0] == sampled(1)
    assert len({tuple(f) for f in found}) == 3
    # Of one token, or of next to no probability, only the likeliest is left.
    likeliest = server.expected[PROMPTS[0]].ids[:12]
    assert sampled(1, top_k=1) == likeliest
    assert sampled(1, top_p=1e-6) == likeliest
    assert sampled(1, temperature="0.0") == likeliest


def test_length_is_what_was_asked_for_and_what_there_is_room_for(server: Server) -> None:
    assert len(server.generate("a")["token_ids"]) == 16
    (one,) = [server.generate("a", max_tokens=1)["token_ids"]]
    assert one == server.expected["a"].ids[0]
    answer = server.generate("a", max_tokens=5000)
    assert len(answer["token_ids"]) == 127
    assert answer["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("prompt", "parameters", "told"),
    [
        ("a", {"temperatur": 1}, "unknown parameter 'temperatur'; known: max_tokens"),
        ("a", {"temperature": -1}, "temperature is '-1'; allowed: float from 0 to 100"),
        ("a", {"max_tokens": 0}, "max_tokens is '0'"),
        ("a", {"max_tokens": 2.5}, "max_tokens is '2.5'; allowed: int"),
        ("a", {"top_p": "NaN"}, "top_p is 'NaN'"),
        ("a", {"top_k": True}, "top_k is 'True'"),
        ("a", {"sampling_parameters": "[1]"}, "not a JSON object"),
        ("a", {"sampling_parameters": "{"}, "not JSON"),
        ("", {}, "a prompt of 0 tokens"),
        ("cat " * 128, {}, "tokens; allowed: 1 to 127"),
    ],
)
def test_what_cannot_be_answered_is_said(
    server: Server, prompt: str, parameters: dict[str, Any], told: str
) -> None:
    assert told in server.generate(prompt, **parameters)["error"]
    assert "token_ids" in server.generate("a", max_tokens=1)  # and the next one is served


@pytest.mark.parametrize("transport", ["http", "grpc"])
def test_the_clients_print_the_answer(server: Server, transport: str) -> None:
    prompt = PROMPTS[0]
    arguments = (prompt, "--max-tokens", str(STEPS))
    for more in ((), ("--stream",)):
        done = server.client(transport, *arguments, *more)
        assert done.returncode == 0, done.stderr
        assert done.stdout == server.expected[prompt].text + "\n"
    refused = server.client(transport, "a", "--temperature", "-1")
    assert refused.returncode == 1
    assert "127.0.0.1:" in refused.stderr
    assert "allowed: float from 0 to 100" in refused.stderr


def test_a_client_says_that_there_is_no_server(server: Server) -> None:
    done = server.client("http", "a", "--url", "http://127.0.0.1:9")
    assert done.returncode == 1
    assert done.stderr.startswith("http://127.0.0.1:9: ")


def test_it_stops_at_an_end_at_a_cancellation_and_in_turn(tmp_path: Path, server: Server) -> None:
    """Straight at the model: a token of the answer declared to be the end, and two at once."""
    expected = server.expected[PROMPTS[0]]
    stop = next(t for k, t in enumerate(expected.ids) if k >= 4 and t not in expected.ids[:k])
    code = f"""
import json, shutil, sys
from pathlib import Path
sys.path.insert(0, {str(HERE)!r})
shutil.copytree({str(server.repository)!r}, "copy")
path = Path("copy/llm/1/weights/genai_config.json")
config = json.loads(path.read_text())
config["model"]["eos_token_id"] = [{stop}]
path.write_text(json.dumps(config))
import triton_server_worker as worker
model = worker.Model(Path("copy"))
asked = {{"text_input": {PROMPTS[0].encode()!r}, "exclude_input_in_output": True}}
ends = [list(model.ask(asked, p))[-1][0] for p in
        ({{"max_tokens": {STEPS}}}, {{"max_tokens": {STEPS}, "min_tokens": {STEPS}}})]
cancelled = worker.pb_utils.InferenceRequest(
    [worker.pb_utils.Tensor("text_input", worker.np.array([b"a"], dtype=object))], {{}})
cancelled.get_response_sender().cancelled = True
model._model.execute([cancelled])
response, last = cancelled.get_response_sender().arrived.get(timeout=60)
pair = [worker.pb_utils.InferenceRequest([
            worker.pb_utils.Tensor("text_input", worker.np.array([b"a"], dtype=object)),
            worker.pb_utils.Tensor("stream", worker.np.array([True]))],
            {{"max_tokens": n, "min_tokens": n}}) for n in (120, 2)]
model._model.execute(pair)
model.finalize()
long, short = (request.get_response_sender() for request in pair)
turns = [sender is long for sender in worker.pb_utils.SENT if sender in (long, short)]
said = sum(turns[:len(turns) - turns[::-1].index(False)])
whole = long.arrived.qsize()
print(json.dumps([*map(worker.as_json, ends), response.error().code(), last, said, whole]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    stopped, forced, code_of_cancelled, last, said, whole = json.loads(done.stdout)
    assert stopped["finish_reason"] == "stop"
    assert stopped["token_ids"] == expected.ids[: expected.ids.index(stop) + 1]
    assert forced["finish_reason"] == "length"
    assert len(forced["token_ids"]) == STEPS
    assert stop not in forced["token_ids"]
    assert (code_of_cancelled, last) == (7, True)
    # The short answer was there long before the long one, which `finalize` waited for.
    assert 1 <= said < 100
    assert whole == 120
