"""A model that answers: batches change nothing, what is drawn is drawn by a seed, stops stop."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from makers import PicoMaker
from paretron.artifacts.models import load_model, load_tokenizer
from paretron.evaluate import asking
from paretron.evaluate.asking import ModelAsker, cut


def asker_of(model: Path, *, micro_batch: int = 3) -> ModelAsker:
    return ModelAsker(
        load_model(model), load_tokenizer(model), micro_batch, lambda kind, fields: None
    )


def some_pairs(count: int = 12, *, longest: int = 30) -> list[tuple[list[int], list[int]]]:
    rng = random.Random(0)
    pairs = []
    for _ in range(count):
        first = [rng.randrange(3, 300) for _ in range(rng.randint(1, longest))]
        second = [rng.randrange(3, 300) for _ in range(rng.randint(1, 4))]
        # What differs in its last token alone is run once, and cut at another place.
        pairs += [(first, second), (first, [*second[:-1], 7]), ([*first, *second[:-1]], [9])]
    return pairs


# Logits capped, logits divided, experts: the head is more than one product, rows are routed.
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "mixtral"])
def test_likelihoods_are_those_of_each_text_alone(
    family: str, pico: PicoMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "_LOGITS_AT_ONCE", 320 * 2)
    asker, pairs = asker_of(pico(family)), some_pairs()
    found = asker.log_likelihoods(pairs)
    for (first, second), (nats, greedy) in zip(pairs, found, strict=True):
        ids = torch.tensor([[*first, *second]])
        with torch.inference_mode():
            logs = asker.network(input_ids=ids).logits.float().log_softmax(-1)[0, :-1]
        own = logs[-len(second) :]
        alone = float(own.gather(1, torch.tensor(second)[:, None]).sum())
        assert nats == pytest.approx(alone, abs=1e-4)
        assert greedy == (own.argmax(-1).tolist() == second)


def test_greedy_is_seen(pico: PicoMaker) -> None:
    asker = asker_of(pico())
    first = [5, 6, 7]
    said = asker.network.generate(torch.tensor([first]), max_new_tokens=3, do_sample=False)
    second = said[0, 3:].tolist()
    (_, greedy), (_, other) = asker.log_likelihoods(
        [(first, second), (first, [*second[:-1], (second[-1] + 1) % 320])]
    )
    assert (greedy, other) == (True, False)


def test_what_is_too_long_loses_its_start(pico: PicoMaker) -> None:
    asker = asker_of(pico(max_position_embeddings=16))
    (first, second), *_ = some_pairs(1, longest=14)
    long = [8] * 40 + first
    cut_by_hand = ([*long, *second][-17 : -len(second)], second)
    (a, _), (b, _) = asker.log_likelihoods([(long, second), cut_by_hand])
    assert a == pytest.approx(b, abs=1e-6)


def test_the_head_never_sees_all_positions_at_once(
    pico: PicoMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "_LOGITS_AT_ONCE", 320 * 2)
    asker, seen = asker_of(pico()), []
    asker.network.get_output_embeddings().register_forward_hook(
        lambda module, args, out: seen.append(out.shape[0])
    )
    asker.log_likelihoods(some_pairs())
    assert max(seen) == 2


PROMPTS = [[5, 6], [7] * 9, [8, 9, 10, 11], [12]]


def test_prompts_of_several_lengths_are_written_on_as_each_alone(pico: PicoMaker) -> None:
    asker, alone = asker_of(pico(), micro_batch=4), asker_of(pico(name="again"), micro_batch=1)
    how: Any = {"max_tokens": 6, "until": [], "temperature": 0.0, "top_p": 1.0}
    assert asker.generate(PROMPTS, **how) == alone.generate(PROMPTS, **how)


def test_drawing_is_by_a_seed_and_a_nucleus(pico: PicoMaker) -> None:
    asker = asker_of(pico())

    def said(temperature: float, top_p: float) -> list[str]:
        return asker.generate(PROMPTS, max_tokens=8, until=[], temperature=temperature, top_p=top_p)

    assert said(1.0, 0.9) == said(1.0, 0.9)
    assert said(1.0, 0.9) != said(0.0, 1.0)
    assert said(1.0, 1e-6) == said(0.0, 1.0)  # the nucleus is one token


def test_the_folders_own_way_of_drawing_does_not_count(pico: PicoMaker) -> None:
    plain, other = asker_of(pico()), asker_of(pico(name="again"))
    config = other.network.generation_config
    config.do_sample, config.temperature, config.repetition_penalty = True, 5.0, 3.0
    how: Any = {"max_tokens": 8, "until": [], "temperature": 0.0, "top_p": 1.0}
    assert plain.generate(PROMPTS, **how) == other.generate(PROMPTS, **how)


def test_a_text_ends_where_it_is_told_to(pico: PicoMaker) -> None:
    assert cut("one. two! three", ["!", "."]) == "one"
    assert cut("one", ["x", "y"]) == "one"
    asker = asker_of(pico())
    how: Any = {"max_tokens": 12, "temperature": 0.0, "top_p": 1.0}
    whole = asker.generate(PROMPTS, until=[], **how)
    stop = whole[1][3:5]
    assert stop
    assert asker.generate(PROMPTS, until=[stop], **how) == [cut(text, [stop]) for text in whole]
