"""How texts are cut: every token scored once, with the context that was promised."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from makers import PicoMaker
from paretron.artifacts.manifest import Provenance
from paretron.artifacts.models import load_model, load_tokenizer
from paretron.data.store import TokenStore
from paretron.data.tokens import build_token_store
from paretron.errors import Code, ParetronError
from paretron.evaluate.perplexity import Loss, NetworkReader, measure_texts, open_texts
from paretron.evaluate.spans import Span, spans_of
from paretron.evaluate.stage import evaluate_model
from paretron.recipe import Evaluate

SEQ_LEN, STRIDE = 16, 5
SLIDING = Evaluate(by="sliding", stride=STRIDE, micro_batch=3)
DOCUMENT = Evaluate(by="document", stride=STRIDE, micro_batch=3)
# One is longer than a window, one is nothing but its end, one is a single letter.
DOCUMENTS = ("the cat sat on the mat and the dog ran after it " * 4, "", "a", "the day was long")


@pytest.fixture
def model(pico: PicoMaker) -> Path:
    return pico(num_hidden_layers=2)


@pytest.fixture
def store(model: Path, tmp_path: Path) -> TokenStore:
    return build_token_store(DOCUMENTS, load_tokenizer(model), tmp_path / "store", eos_token_id=1)


def measured(model: Path, store: TokenStore, settings: Evaluate, **more: Any) -> Loss:
    found = evaluate_model(
        model,
        {"validation": (store.folder, more.pop("seq_len", SEQ_LEN))},
        settings=settings,
        out=store.folder.parent / f"out-{settings.by}",
        provenance=Provenance("evaluation"),
        on_event=lambda kind, fields: None,
    )
    return found.texts["validation"]


def contexts(count: int) -> Iterator[tuple[int, int]]:
    """(token, first token that it sees) by the definition of a window that slides."""
    for token in range(1, count):
        moves = max(0, -(-(token + 1 - SEQ_LEN) // STRIDE))
        end = min(SEQ_LEN + moves * STRIDE, count)
        yield token, max(0, end - SEQ_LEN)


def reference(model: Path, ids: torch.Tensor) -> tuple[float, int]:
    """The summed loss of each token alone, in float64, after exactly what it sees."""
    network, nats = load_model(model, dtype=torch.float64), 0.0
    seen = list(contexts(len(ids)))
    with torch.inference_mode():
        for token, first in seen:
            logits = network(ids[None, first:token]).logits[0, -1]
            nats -= float(logits.log_softmax(-1)[ids[token]])
    return nats, len(seen)


def bounds(store: TokenStore) -> list[tuple[int, int]]:
    return list(pairwise([*store.document_starts.tolist(), store.num_tokens]))


def test_sliding_is_each_token_after_what_it_sees(model: Path, store: TokenStore) -> None:
    nats, tokens = reference(model, store.tokens(0, store.num_tokens))
    found = measured(model, store, SLIDING)
    assert (found.tokens, found.per) == (tokens, "sliding") == (store.num_tokens - 1, "sliding")
    assert found.loss == pytest.approx(nats / tokens, rel=1e-6)


def test_a_document_knows_nothing_of_the_one_before(model: Path, store: TokenStore) -> None:
    parts = [store.tokens(a, b - a) for a, b in bounds(store)]
    assert max(map(len, parts)) > 2 * SEQ_LEN
    assert min(map(len, parts)) == 1
    sums = [reference(model, part) for part in parts]
    nats, tokens = sum(s for s, _ in sums), sum(n for _, n in sums)
    found = measured(model, store, DOCUMENT)
    assert (found.tokens, found.per) == (tokens, "document")
    assert found.loss == pytest.approx(nats / tokens, rel=1e-6)
    # The two ways differ by far more than they may err.
    assert abs(found.loss - measured(model, store, SLIDING).loss) > 1e-3


@pytest.mark.parametrize("stride", [1, 4, 7, SEQ_LEN - 1])
@pytest.mark.parametrize("copies", [1, 7])
def test_each_token_counts_once_with_its_context(
    stride: int, copies: int, model: Path, tmp_path: Path
) -> None:
    texts = DOCUMENTS * copies
    store = build_token_store(texts, load_tokenizer(model), tmp_path / "more", eos_token_id=1)
    firsts = {start for start, _ in bounds(store)}
    for settings, begins in (
        (Evaluate(by="sliding", stride=stride), {0}),
        (Evaluate(by="document", stride=stride), firsts),
    ):
        seen: list[int] = []
        for span in spans_of(store, SEQ_LEN, settings)():
            assert span.length <= SEQ_LEN
            end = span.first + span.length
            if span.first not in begins:  # not the first window of its document
                assert span.length - span.scored >= SEQ_LEN - stride
            else:
                assert span.scored in (span.length - 1, stride)
            seen += range(end - span.scored, end)
        assert sorted(seen) == sorted(set(range(store.num_tokens)) - begins)


def test_units_are_windows_blocks_as_long_and_documents(store: TokenStore) -> None:
    def sizes(settings: Evaluate) -> Mapping[int, int]:
        found: dict[int, int] = {}
        for span in spans_of(store, SEQ_LEN, settings)():
            found[span.unit] = found.get(span.unit, 0) + span.scored
        return found

    whole = store.num_tokens // SEQ_LEN
    assert sizes(Evaluate()) == dict.fromkeys(range(whole), SEQ_LEN - 1)
    blocks = sizes(SLIDING)
    assert list(blocks) == list(range(len(blocks)))
    assert all(abs(n - SEQ_LEN) < STRIDE for n in list(blocks.values())[1:-1])
    lengths = [b - a - 1 for a, b in bounds(store) if b - a > 1]
    assert sizes(DOCUMENT) == dict(enumerate(lengths))


def test_what_was_read_has_a_name_of_its_own(model: Path, tmp_path: Path) -> None:
    """Other tokens, and the same ones cut otherwise, are never taken for a pair."""
    names = set()
    tokenizer, network = load_tokenizer(model), NetworkReader(load_model(model))
    for number, texts in enumerate((["the cat sat on it"], ["the cat ran on it"])):
        store = build_token_store(texts, tokenizer, tmp_path / f"{number}", eos_token_id=1)
        for settings in (Evaluate(), SLIDING.model_copy(update={"stride": 2}), DOCUMENT):
            for seq_len in (6, 7):
                opened = open_texts({"text": (store.folder, seq_len)}, settings=settings)
                found = measure_texts(
                    network, opened, settings=settings, where="here", on_event=lambda k, f: None
                )
                names.add(found["text"][1].text)
    assert len(names) == 2 * 3 * 2


def test_windows_stand_side_by_side(store: TokenStore) -> None:
    spans = list(spans_of(store, SEQ_LEN, Evaluate())())
    assert spans[:2] == [Span(0, 0, 16, 15), Span(1, 16, 16, 15)]
    assert len(spans) == store.num_tokens // SEQ_LEN


def test_a_text_shorter_than_a_window(model: Path, store: TokenStore) -> None:
    """One span of all of it where windows slide; no whole window where they stand side by side."""
    long = 4 * store.num_tokens
    assert measured(model, store, SLIDING, seq_len=long).tokens == store.num_tokens - 1
    whole = measured(model, store, DOCUMENT, seq_len=long)
    assert whole.tokens == sum(b - a - 1 for a, b in bounds(store))
    with pytest.raises(ParetronError) as caught:
        measured(model, store, Evaluate(), seq_len=long)
    assert caught.value.problems[0].code is Code.INPUT_CORPUS


@pytest.mark.parametrize("settings", [SLIDING, DOCUMENT], ids=["sliding", "document"])
def test_a_text_of_one_token_predicts_nothing(
    settings: Evaluate, model: Path, tmp_path: Path
) -> None:
    store = build_token_store([""], load_tokenizer(model), tmp_path / "one", eos_token_id=1)
    assert store.num_tokens == 1
    with pytest.raises(ParetronError) as caught:
        measured(model, store, settings)
    assert caught.value.problems[0].code is Code.INPUT_CORPUS


def test_a_stride_must_leave_context(model: Path, store: TokenStore) -> None:
    with pytest.raises(ParetronError) as caught:
        measured(model, store, Evaluate(by="sliding", stride=SEQ_LEN))
    (problem,) = caught.value.problems
    assert (problem.code, problem.where) == (Code.RECIPE_VALUE, "evaluate.stride")
    assert str(SEQ_LEN - 1) in problem.fix
    with pytest.raises(ValueError, match="by: sliding or by: document"):
        Evaluate(stride=4)
