"""A recipe's text as tokens: several sources of several kinds, and what they are known by."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from makers import PicoMaker
from paretron.data.store import TokenStore, sample_windows
from paretron.errors import ParetronError
from paretron.recipe import TokenisedSource
from paretron.run.texts import build_store


@pytest.fixture
def sources(tmp_path: Path) -> list[dict[str, Any]]:
    lines = [json.dumps({"text": "the cat " * 20}) for _ in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    table = pa.table({"body": ["1 + 2\n" * 12] * 500})
    parquet.write_table(table, tmp_path / "b.parquet", row_group_size=100)
    return [
        {"path": str(tmp_path / "a.jsonl"), "weight": 2},
        {"path": str(tmp_path / "b.parquet"), "weight": 1, "column": "body"},
    ]


def built(text: dict[str, Any], folder: Path, tokenizer: Path) -> TokenStore:
    source = TokenisedSource.model_validate(text)
    build_store(source, folder, tokenizer=tokenizer, max_tokens=source.tokens, offline=True)
    return TokenStore.open(folder)


def test_sources_become_one_store_with_their_shares(
    sources: list[dict[str, Any]], pico: PicoMaker, tmp_path: Path
) -> None:
    text = {"sources": sources, "tokens": 3000}
    tokenizer = pico()
    stores = [built(text, tmp_path / name, tokenizer) for name in ("one", "two")]
    first, second = (sample_windows(store, 20, 32, seed=3) for store in stores)
    assert first.equal(second)
    store = stores[0]
    assert store.num_tokens == 3000
    only_b = {"sources": sources[1:], "tokens": 50}
    alone = built(only_b, tmp_path / "b", tokenizer)
    of_b = int(alone.window(0, 1))
    everything = [int(store.window(k, 1)) for k in range(3000)]
    starts = [*map(int, store.document_starts), 3000]
    tokens = sum(end - start for start, end in pairwise(starts) if everything[start] == of_b)
    assert abs(tokens - 1000) <= 200


def test_a_source_that_runs_out_ends_the_stage(
    sources: list[dict[str, Any]], pico: PicoMaker, tmp_path: Path
) -> None:
    tokenizer = pico()
    text = {"sources": sources, "tokens": 10**6}
    with pytest.raises(ParetronError, match=r"its share of 1000000 is 666667") as caught:
        built(text, tmp_path / "store", tokenizer)
    assert caught.value.problems[0].where == sources[0]["path"]
    sources[0]["repeat"] = True
    assert built(text | {"tokens": 20000}, tmp_path / "store", tokenizer).num_tokens == 20000
