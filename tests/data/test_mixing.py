from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paretron.data.mixing import Mixture, Piece, Share
from paretron.data.tokens import build_token_store
from paretron.errors import Code, ParetronError
from pico import pico_tokenizer


def lengths(texts: Iterable[str]) -> Iterator[Piece]:
    """A document "a:7" as seven tokens that are the letter, in pieces of at most three."""
    for text in texts:
        letter, _, count = text.partition(":")
        left = int(count)
        while left:
            size = min(3, left)
            yield left == int(count), size == left, [ord(letter)] * size
            left -= size


def share(letter: str, weight: float, sizes: list[int], *, repeat: bool = False) -> Share:
    return Share(letter, weight, lambda: [f"{letter}:{n}" for n in sizes], repeat)


def tokens(mixture: Mixture) -> str:
    return "".join(chr(t) for _, _, ids in mixture.pieces(lengths) for t in ids)


@given(
    weights=st.lists(st.floats(0.05, 20), min_size=1, max_size=4),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=10),
    max_tokens=st.integers(1, 3000),
)
def test_every_share_is_its_weight_within_one_document_wherever_it_is_cut(
    weights: list[float], sizes: list[int], max_tokens: int
) -> None:
    shares = tuple(share("abcd"[k], w, sizes, repeat=True) for k, w in enumerate(weights))
    text = tokens(Mixture(shares, max_tokens))
    assert max_tokens <= len(text) < max_tokens + 40
    for cut in (len(text) // 3, max_tokens):
        for k, weight in enumerate(weights):
            ahead = text[:cut].count("abcd"[k]) - cut * weight / sum(weights)
            assert -2 * max(sizes) <= ahead <= max(sizes)


def test_a_document_stays_whole_and_the_mixture_is_the_same_every_time() -> None:
    mixture = Mixture((share("a", 1, [7, 2] * 9), share("b", 2, [5] * 9)), 40)
    text = tokens(mixture)
    assert text == tokens(mixture)
    assert text.startswith("bbbbbaaaaaaabbbbbbbbbbaa")
    begins = [begin for begin, _, _ in mixture.pieces(lengths)]
    ends = [end for _, end, _ in mixture.pieces(lengths)]
    assert begins[1:] == ends[:-1]  # whoever ends makes room for the next


def test_a_text_that_runs_out_is_named_with_what_it_had() -> None:
    with pytest.raises(ParetronError) as caught:
        tokens(Mixture((share("a", 1, [10] * 100), share("b", 3, [10, 11])), 100))
    problem = caught.value.problems[0]
    assert problem.code is Code.INPUT_CORPUS
    assert problem.where == "b"
    assert problem.cause == "holds 21 tokens; its share of 100 is 75"
    assert "at most 28" in problem.fix


def test_what_is_advised_then_works() -> None:
    shares = (share("a", 1, [10] * 100), share("b", 3, [10, 11]))
    assert len(tokens(Mixture(shares, 28))) >= 28


def test_a_repeated_text_that_is_empty_ends_too() -> None:
    with pytest.raises(ParetronError, match="holds 0 tokens"):
        tokens(Mixture((share("a", 1, [], repeat=True),), 10))


def test_a_mixture_becomes_one_store(tmp_path: Path) -> None:
    tokenizer = pico_tokenizer()
    texts = {"a": ["the cat " * 30] * 50, "b": ["1 + 2\n" * 9] * 400}
    shares = tuple(
        Share(name, weight, partial(texts.__getitem__, name), repeat=False)
        for name, weight in (("a", 0.7), ("b", 0.3))
    )
    store = build_token_store(
        Mixture(shares, 5000), tokenizer, tmp_path / "store", eos_token_id=1, max_tokens=5000
    )
    assert store.num_tokens == 5000
    starts = [*map(int, store.document_starts), 5000]
    of_b = sum(
        end - start
        for start, end in pairwise(starts)
        if tokenizer.decode(store.window(start, 1)).startswith("1")
    )
    longest = max(end - start for start, end in pairwise(starts))
    assert abs(of_b - 1500) <= longest
