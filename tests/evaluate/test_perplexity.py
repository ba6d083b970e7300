"""Loss and perplexity: equal to the plain computation, bounded in memory, honest about failure."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from paretron.artifacts.manifest import verify
from paretron.artifacts.models import load_model, load_tokenizer
from paretron.artifacts.staging import Provenance
from paretron.data.store import TokenStore
from paretron.data.tokens import build_token_store
from paretron.errors import Code, ParetronError
from paretron.evaluate import perplexity, stage
from paretron.evaluate.perplexity import Loss, summed_loss
from paretron.evaluate.stage import evaluate_model
from paretron.recipe import Evaluate
from pico import PICO_FAMILIES

PicoMaker = Callable[..., Path]
SEQ_LEN = 24


def make_store(model: Path, folder: Path, *, copies: int = 40) -> TokenStore:
    texts = [f"the cat sat on mat {i}, and the dog ran after it" for i in range(copies)]
    return build_token_store(texts, load_tokenizer(model), folder, eos_token_id=1)


def run(
    model: Path, out: Path, stores: Mapping[str, tuple[Path, int]], **more: Any
) -> Mapping[str, Loss]:
    common: dict[str, Any] = {
        "provenance": Provenance("evaluation"), "settings": Evaluate(micro_batch=3),
        "on_event": lambda kind, fields: None,
    }  # fmt: skip
    return evaluate_model(model, stores, out=out, **(common | more)).texts


def plain_loss(model: Path, store: TokenStore) -> tuple[float, int]:
    network = load_model(model, dtype=torch.float64)
    ids = torch.stack([store.window(i, SEQ_LEN) for i in range(store.windows(SEQ_LEN))])
    with torch.inference_mode():
        logits = network(ids).logits[:, :-1]
    targets = ids[:, 1:]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    return float(loss), targets.numel()


@pytest.mark.parametrize("family", PICO_FAMILIES)
def test_it_is_the_mean_over_predicted_tokens(
    family: str, pico: PicoMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perplexity, "_LOGITS_AT_ONCE", 320 * 7)  # 7 does not divide 3 * 23
    model = pico(family)
    store = make_store(model, tmp_path / "store")
    assert store.windows(SEQ_LEN) % 3  # the last batch is smaller
    found = run(model, tmp_path / "out", {"validation": (store.folder, SEQ_LEN)})
    loss, tokens = plain_loss(model, store)
    assert found["validation"].tokens == tokens
    assert found["validation"].loss == pytest.approx(loss, rel=1e-6)
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert written["tasks"] == {}
    assert written["texts"]["validation"] == {
        "loss": found["validation"].loss,
        "perplexity": math.exp(found["validation"].loss),
        "tokens": tokens,
        "low": found["validation"].low,
        "high": found["validation"].high,
        "per": "window",
    }
    verify(tmp_path / "out")


def test_several_texts_and_their_progress(pico: PicoMaker, tmp_path: Path) -> None:
    model = pico(num_hidden_layers=1)
    a, b = make_store(model, tmp_path / "a"), make_store(model, tmp_path / "b", copies=9)
    events: list[tuple[str, Mapping[str, object]]] = []
    stores = {"validation": (a.folder, SEQ_LEN), "train": (b.folder, 10)}
    found = run(
        model, tmp_path / "out", stores, on_event=lambda kind, fields: events.append((kind, fields))
    )
    assert list(found) == ["validation", "train"]
    assert found["train"].tokens == 9 * b.windows(10)
    progress = [f for kind, f in events if kind == "progress"]
    total = a.windows(SEQ_LEN) + b.windows(10)
    assert progress[-1] == {"done": total, "total": total, "unit": "windows"}
    assert [f["loss"] for kind, f in events if kind == "eval"] == [
        found["validation"].loss, found["train"].loss,
    ]  # fmt: skip


def test_logits_never_exist_for_all_positions_at_once(
    pico: PicoMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perplexity, "_LOGITS_AT_ONCE", 320 * 8)
    network = load_model(pico(num_hidden_layers=1))
    seen: list[int] = []
    network.get_output_embeddings().register_forward_hook(
        lambda module, args, out: seen.append(out.shape[0])
    )
    summed_loss(network, torch.randint(0, 320, (4, 50)))
    assert max(seen) == 8
    assert sum(seen) == 4 * 49


def test_a_model_that_scales_its_logits_is_not_measured_wrongly(
    pico: PicoMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pico(num_hidden_layers=1)
    store = make_store(model, tmp_path / "store")

    def scaling(path: Path) -> Any:
        network = load_model(path)
        forward = network.forward

        def scaled(*args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            out.logits = out.logits / 2
            return out

        network.forward = scaled
        return network

    monkeypatch.setattr(stage, "load_model", scaling)
    with pytest.raises(ParetronError) as caught:
        run(model, tmp_path / "out", {"validation": (store.folder, SEQ_LEN)})
    assert caught.value.problems[0].code is Code.GATE_PREFLIGHT
    assert not (tmp_path / "out").exists()


def test_a_model_that_gives_no_number_is_refused(pico: PicoMaker, tmp_path: Path) -> None:
    model = pico(num_hidden_layers=1)
    store = make_store(model, tmp_path / "store")
    weights = load_file(model / "model.safetensors")
    # Far down in the vocabulary, so that the preflight's first tokens do not see it.
    weights["model.embed_tokens.weight"][200:] = math.nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ParetronError) as caught:
        run(model, tmp_path / "out", {"validation": (store.folder, SEQ_LEN)})
    assert (caught.value.problems[0].code, caught.value.exit_code) == (Code.GATE_NONFINITE, 5)
    assert "validation" in caught.value.problems[0].where
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seq_len", [1, 100_000])
def test_a_text_without_a_prediction_is_refused(
    seq_len: int, pico: PicoMaker, tmp_path: Path
) -> None:
    model = pico(num_hidden_layers=1)
    store = make_store(model, tmp_path / "store", copies=3)
    with pytest.raises(ParetronError) as caught:
        run(model, tmp_path / "out", {"validation": (store.folder, seq_len)})
    assert (caught.value.problems[0].code, caught.value.exit_code) == (Code.INPUT_CORPUS, 3)
