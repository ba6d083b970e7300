"""The real vLLM as evaluator: what it serves, a quantised export too, is judged as it computes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from paretron.artifacts.manifest import Provenance, read_manifest
from paretron.artifacts.models import load_model, load_tokenizer
from paretron.cli.main import main
from paretron.data.store import TokenStore
from paretron.data.tokens import build_token_store
from paretron.errors import Code, ParetronError
from paretron.evaluate.asking import ModelAsker
from paretron.evaluate.differences import differences
from paretron.evaluate.endpoint import Endpoint, connected
from paretron.evaluate.perplexity import NetworkReader, measure_texts, open_texts
from paretron.evaluate.served import ServedAsker
from paretron.evaluate.stage import evaluate_model, evaluate_server
from paretron.recipe import Engine, Evaluate, Export
from paretron_exporters.hf import EXPORTER
from paretron_profiling.servers.serving import serving
from picotask import TASK, sentences
from vllmserver import served

SEQ_LEN = 24
BY_DOCUMENT = Evaluate(by="document", micro_batch=5)


def quiet(kind: str, fields: object) -> None:
    """No word of progress."""


@dataclass(frozen=True)
class Places:
    """A model, its export in integers, a text in their tokens, and where each is served.

    The export by a server of our own: its name there, and what it runs with.
    """

    model: Path
    int8: Path
    store: TokenStore
    model_url: str
    int8_url: str
    int8_name: str
    int8_about: dict[str, str]


@pytest.fixture(scope="module")
def places(learned: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Places]:
    """Two servers, started at once: it takes them half a minute."""
    python = os.environ.get("PARETRON_VLLM_PYTHON")
    if not python:
        pytest.skip("PARETRON_VLLM_PYTHON names no interpreter that has vLLM")
    folder = tmp_path_factory.mktemp("served")
    EXPORTER.export(
        learned,
        export=Export(to="hf", quantize="int8"),
        texts=None,
        out=folder / "int8",
        provenance=Provenance(kind="export", stamp="TEST"),
        on_event=quiet,
    )
    texts = [f"{good} {bad}" for good, bad in sentences(held_out=True)]
    store = build_token_store(texts, load_tokenizer(learned), folder / "store", eos_token_id=1)
    engine = Engine(name="vllm_server", python=Path(python), dtype="float32")
    contexts: list[Any] = [
        served(python, learned, dtype="float32", home=folder),
        serving(folder / "int8", settings=engine, batch=5, tokens=SEQ_LEN + 1),
    ]
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        url, ours = pool.map(stack.enter_context, contexts)
        yield Places(learned, folder / "int8", store, url, *ours)


def stores(places: Places) -> dict[str, tuple[Path, int]]:
    return {"validation": (places.store.folder, SEQ_LEN)}


@pytest.mark.parametrize("by", ["window", "sliding", "document"])
def test_the_loss_is_the_models_own(by: Any, places: Places) -> None:
    settings = Evaluate(by=by, micro_batch=5)
    opened = open_texts(stores(places), settings=settings)
    own = NetworkReader(load_model(places.model))
    with connected(places.model_url, offline=True) as endpoint:
        (expected, units), (found, found_units) = (
            measure_texts(reader, opened, settings=settings, where="here", on_event=quiet)[
                "validation"
            ]
            for reader in (own, endpoint)
        )
    assert found.loss == pytest.approx(expected.loss, abs=1e-5)
    assert (found.tokens, found_units.text) == (expected.tokens, units.text)
    assert found_units.nats == pytest.approx(units.nats, abs=1e-3)


def test_what_was_written_in_integers_is_judged_as_it_runs(places: Places, tmp_path: Path) -> None:
    """Against the numbers in the files, the activations rounded by token as the form says."""
    settings = BY_DOCUMENT
    opened = open_texts(stores(places), settings=settings)
    reader = NetworkReader(decoded(places.model, places.int8))
    expected, _ = measure_texts(
        reader, opened, settings=settings, where="here", on_event=quiet
    )["validation"]  # fmt: skip
    common: dict[str, Any] = {
        "settings": settings, "provenance": Provenance("evaluation"), "on_event": quiet,
    }  # fmt: skip
    before = evaluate_model(places.model, stores(places), out=tmp_path / "before", **common)
    common["about"] = places.int8_about
    with connected(places.int8_url, model=places.int8_name, offline=True) as endpoint:
        assert endpoint.context == SEQ_LEN + 1
        after = evaluate_server(
            endpoint, stores(places), tokenizer=places.int8, out=tmp_path / "after", **common
        )
    found, was = after.texts["validation"], before.texts["validation"]
    assert found.loss == pytest.approx(expected.loss, abs=3e-4)
    assert abs(found.loss - was.loss) > 6e-4  # or this could be the model itself
    apart = differences(tmp_path / "before", tmp_path / "after")["loss.validation"]
    assert apart["value"] == pytest.approx(found.loss - was.loss, abs=1e-12)
    assert was.low is not None
    assert was.high is not None
    assert apart["high"] - apart["low"] < (was.high - was.low) / 10
    assert apart["pairs"] == len(places.store.document_starts)
    said = read_manifest(tmp_path / "after")["settings"]["server"]
    assert (said["engine"], said["dtype"]) == ("vllm_server", "float32")
    assert set(said) >= {"vllm", "torch", "mode"}
    assert not any(key.startswith("client") for key in said)


def decoded(source: Path, folder: Path) -> Any:
    """The source with the weights that were written, its linears reading rounded activations."""
    model, after = load_model(source), load_file(folder / "model.safetensors")

    def rounded(module: object, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        scale = inputs[0].abs().amax(-1, keepdim=True) / 127
        return ((inputs[0] / scale).round().clamp(-127, 127) * scale,)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name + "_scale" in after:
                parameter.copy_(after[name].float() * after[name + "_scale"])
                linear = model.get_submodule(name.removesuffix(".weight"))
                linear.register_forward_pre_hook(rounded)
    return model


def test_it_answers_tasks_as_the_model_itself(places: Places) -> None:
    tokenizer = load_tokenizer(places.model)
    own = ModelAsker(load_model(places.model), tokenizer, 5, quiet)
    encode = tokenizer.encode
    pairs = [
        (encode("the dog"), encode(" runs here.")), (encode("the dogs"), encode(" run here.")),
        ([0], encode("the queen sings here.")), (list(range(3, 300)) * 2, [5, 6]),
    ]  # fmt: skip
    # What the model itself would say is the likeliest of all.
    pairs.append((encode("the fox"), greedy(own.network, encode("the fox"))))
    prompts = [encode("the dog"), encode("the"), encode("the children")]
    drawn: dict[str, Any] = {"max_tokens": 8, "until": ["\n"], "temperature": 0.0, "top_p": 1.0}
    with connected(places.model_url, offline=True) as endpoint:
        asker = ServedAsker(endpoint, tokenizer, 2, quiet)
        assert asker.max_length == 254
        short = [(a[-(asker.max_length - 1) :], b) for a, b in pairs]
        for found, expected in zip(
            asker.log_likelihoods(pairs), own.log_likelihoods(short), strict=True
        ):
            assert found[0] == pytest.approx(expected[0], abs=1e-3)
            assert found[1] == expected[1]
        assert asker.log_likelihoods(pairs)[-1][1] is True
        assert asker.generate(prompts, **drawn) == own.generate(prompts, **drawn)
        again = [asker.generate(prompts[1:2] * 6, **drawn | {"temperature": 2.0}) for _ in "ab"]
        assert again[0] == again[1]  # seeded, and yet each is drawn anew
        assert len(set(again[0])) > 1


def greedy(model: Any, ids: list[int], *, steps: int = 4) -> list[int]:
    tokens = list(ids)
    with torch.inference_mode():
        for _ in range(steps):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(ids) :]


def test_the_command_line_judges_a_server(
    places: Places, own_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    text = {"path": "text.txt", "seq_len": SEQ_LEN}
    (tmp_path / "text.txt").write_text(" ".join(good for good, _ in sentences(held_out=True)))
    recipe.write_text(json.dumps({
        "schema": 1, "teacher": {"model": str(places.model)}, "students": {"a": {"layers": 1}},
        "data": {"calibration": text, "train": text, "validation": text},
        "distill": {"tokens": 1000}, "evaluate": {"by": "sliding", "tasks": [str(TASK)]},
    }))  # fmt: skip
    common = ("eval", places.model, "--recipe", recipe, "--json", "-q", "--offline")
    found: list[Any] = []
    for more in (("--server", places.model_url), ()):
        with pytest.raises(SystemExit) as ended:
            main([*map(str, common), *more, "--out", str(tmp_path / f"out{len(found)}")])
        assert ended.value.code == 0
        found.append(json.loads(capsys.readouterr().out))
    there, here = (said["texts"]["validation"] for said in found)
    assert (there["tokens"], there["per"]) == (here["tokens"], "sliding")
    assert there["loss"] == pytest.approx(here["loss"], abs=1e-5)
    assert found[0]["tasks"] == found[1]["tasks"]
    assert found[0]["tasks"]["agreement"]["samples"] == 72
    said = read_manifest(tmp_path / "out0")["settings"]["server"]
    assert said == {"url": f"{places.model_url}/v1", "model": "student"}


@pytest.mark.parametrize(
    ("rows", "code", "said"),
    [
        ([list(range(3, 259))], Code.RECIPE_VALUE, "at most 255"),
        ([[5, 400]], Code.ENGINE, "out of vocabulary"),
    ],
)
def test_what_the_server_refuses(
    rows: list[list[int]], code: Code, said: str, places: Places
) -> None:
    with connected(places.model_url) as endpoint, pytest.raises(ParetronError) as caught:
        endpoint.read(rows)
    (problem,) = caught.value.problems
    assert problem.code is code
    assert said in str(problem)


def test_a_model_that_is_not_served(places: Places) -> None:
    with pytest.raises(ParetronError) as caught, connected(places.model_url, model="teacher"):
        raise AssertionError("connected")
    (problem,) = caught.value.problems
    assert problem.code is Code.ENGINE
    assert "student" in problem.fix


def test_the_longest_row_that_fits(places: Places) -> None:
    with connected(places.model_url) as endpoint:
        assert isinstance(endpoint, Endpoint)
        (answer,) = endpoint.read([list(range(3, 258))])
    assert len(answer) == 254
