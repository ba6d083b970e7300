"""Documents apart: a packed window gives what each of its documents gives alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from paretron.data.store import TokenStore
from paretron.data.tokens import build_token_store
from paretron.distill.batches import Batch, Windows
from paretron.distill.fused import DeferredLogits
from paretron.distill.losses import IGNORE
from paretron.distill.objective import Objective, predict
from pico import MOE_FAMILIES, PICO_FAMILIES, pico_model, pico_tokenizer

EOS, SEQ_LEN = 1, 96
# Shorter and longer than the sliding windows of 8 tokens that some families have.
TEXTS = ["the cat", "x", "def main(self): return self.value", "and the dog ran after it; " * 9] * 3


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    return build_token_store(TEXTS, pico_tokenizer(), tmp_path / "store", eos_token_id=EOS)


def documents(batch: Batch, row: int) -> list[slice]:
    assert batch.position_ids is not None
    starts = [k for k, p in enumerate(batch.position_ids[row].tolist()) if p == 0]
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], SEQ_LEN], strict=True)]


def hidden(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    logits = predict(model, batch).logits
    assert isinstance(logits, DeferredLogits)
    return logits.hidden


def test_positions_follow_the_documents_and_not_their_tokens(store: TokenStore) -> None:
    starts = set(map(int, store.document_starts))
    for seq_len in (2, 7, SEQ_LEN):
        for index in range(store.windows(seq_len)):
            wanted: list[int] = []
            for token in range(index * seq_len, (index + 1) * seq_len):
                begins = token in starts or not wanted
                wanted.append(0 if begins else wanted[-1] + 1)
            assert store.positions(index * seq_len, seq_len).tolist() == wanted


def test_no_label_crosses_the_end_of_a_document(store: TokenStore) -> None:
    joined = Windows(store, SEQ_LEN, 320).batch([0, 1])
    apart = Windows(store, SEQ_LEN, 320, apart=True).batch([0, 1])
    assert joined.position_ids is None
    assert torch.equal(joined.input_ids, apart.input_ids)
    crossing = joined.labels != apart.labels
    assert int(crossing.sum()) > 4
    assert (apart.labels[crossing] == IGNORE).all()
    assert (apart.input_ids[crossing] == EOS).all()
    for row in range(2):
        for part in documents(apart, row):
            assert apart.labels[row, part.stop - 1] == IGNORE
            inside = apart.labels[row, part.start : part.stop - 1]
            assert torch.equal(inside, apart.input_ids[row, part.start + 1 : part.stop])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [*PICO_FAMILIES, *MOE_FAMILIES])
def test_a_window_gives_what_its_documents_give_alone(
    family: str, attention: str, store: TokenStore
) -> None:
    model = pico_model(family, num_hidden_layers=2).double()
    model.set_attn_implementation(attention)
    batch = Windows(store, SEQ_LEN, 320, apart=True).batch([0, 2])
    with torch.no_grad():
        packed = hidden(model, batch)
        joined = hidden(model, Windows(store, SEQ_LEN, 320).batch([0, 2]))
        for row in range(2):
            assert len(documents(batch, row)) > 2
            for part in documents(batch, row):
                ids = batch.input_ids[row : row + 1, part]
                alone = hidden(model, Batch(ids, ids, (0,)))[0]
                torch.testing.assert_close(packed[row, part], alone, atol=1e-5, rtol=0)
    assert (packed - joined).abs().max() > 1e-2


def test_the_loss_of_a_window_is_the_sum_of_its_documents(store: TokenStore) -> None:
    objective = Objective(pico_model("gemma2", seed=1, num_hidden_layers=2).double())
    batch = Windows(store, SEQ_LEN, 320, apart=True).batch([0])
    whole, _ = objective(batch, None, 1.0)
    parts = [
        objective(Batch(batch.input_ids[:, p], batch.labels[:, p], (0,)), None, 1.0)[0]
        for p in documents(batch, 0)
        if (batch.labels[:, p] != IGNORE).any()
    ]
    torch.testing.assert_close(whole, torch.stack(parts).sum())
    whole.backward()
    packed = {n: p.grad.clone() for n, p in objective.named_parameters() if p.grad is not None}
    objective.zero_grad()
    torch.stack(parts).sum().backward()
    for name, parameter in objective.named_parameters():
        # some norms are computed in fp32 whatever comes in
        torch.testing.assert_close(packed[name], parameter.grad, atol=1e-5, rtol=1e-5)


def test_a_batch_keeps_its_positions_in_parts(store: TokenStore) -> None:
    batch = Windows(store, SEQ_LEN, 320, apart=True).batch([0, 1, 2])
    assert batch.position_ids is not None
    parts = batch.split(2)
    assert [p.window_ids for p in parts] == [(0, 1), (2,)]
    kept = [
        p.position_ids
        for p in (*parts, batch.to(torch.device("cpu")))
        if p.position_ids is not None
    ]
    assert torch.equal(torch.cat(kept), torch.cat([batch.position_ids] * 2))
