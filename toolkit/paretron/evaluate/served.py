"""A served model, answering the questions of tasks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from paretron.data.answers import SEED, Tokens
from paretron.errors import Code, ParetronError, Problem
from paretron.evaluate.asking import OnEvent, cut
from paretron.evaluate.endpoint import Endpoint

T = TypeVar("T")

_LONGEST = 2048  # lm-eval's own, where a server says nothing


@dataclass(frozen=True)
class ServedAsker:
    """An `Asker` of a model behind a server, which gets `micro_batch` texts in a request."""

    endpoint: Endpoint
    tokenizer: PreTrainedTokenizerBase
    micro_batch: int
    on_event: OnEvent

    @property
    def max_length(self) -> int:
        """Two less than the served context: a likelihood's last token is sent, too, and there must
        be room for one more."""
        return (self.endpoint.context or _LONGEST + 2) - 2

    def log_likelihoods(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[tuple[float, bool]]:
        """Nats of each pair's second after its first, and whether it is what greedy would say.

        UNSUPPORTED for a second that is empty or longer than the context.
        """
        found: list[tuple[float, bool]] = []
        for some in self._some(pairs):
            for _, second in some:
                if not 0 < len(second) <= self.max_length:
                    raise _no_answer(len(second), self.max_length)
            rows = [(*first, *second)[-(self.max_length + 1) :] for first, second in some]
            for (_, second), tokens in zip(some, self.endpoint.read(rows), strict=True):
                own = tokens[-len(second) :]
                found.append((math.fsum(t.nats for t in own), all(t.likeliest for t in own)))
            self._tell(len(found), len(pairs))
        return found

    def generate(
        self,
        prompts: Sequence[Tokens],
        *,
        max_tokens: int,
        until: Sequence[str],
        temperature: float,
        top_p: float,
    ) -> list[str]:
        """A text after each prompt, cut before the first of `until`; drawn by a seed of its own.

        A server draws the same for a prompt by the same seed: one asked again gets the next.
        """
        room = self.max_length + 2 - max_tokens
        settings = {
            "max_tokens": max_tokens,
            "stop": list(until),
            "temperature": temperature,
            "top_p": top_p if temperature else 1.0,
        }
        texts, done = [""] * len(prompts), 0
        for turn, numbers in enumerate(_turns(prompts)):
            for some in self._some(numbers):
                asked = [prompts[k][-room:] for k in some]
                written = self.endpoint.write(asked, settings | {"seed": SEED + turn})
                for k, text in zip(some, written, strict=True):
                    texts[k] = cut(text, until)
                done += len(some)
                self._tell(done, len(prompts))
        return texts

    def _some(self, asked: Sequence[T]) -> Iterator[Sequence[T]]:
        for start in range(0, len(asked), self.micro_batch):
            yield asked[start : start + self.micro_batch]

    def _tell(self, done: int, total: int) -> None:
        self.on_event("progress", {"done": done, "total": total, "unit": "answers"})


def _turns(prompts: Sequence[Tokens]) -> list[list[int]]:
    """The prompts' numbers: of those asked for the first time, of those for the second, ..."""
    seen: Counter[tuple[int, ...]] = Counter()
    turns: list[list[int]] = []
    for number, prompt in enumerate(prompts):
        turn = seen[tuple(prompt)]
        seen[tuple(prompt)] += 1
        if turn == len(turns):
            turns.append([])
        turns[turn].append(number)
    return turns


def _no_answer(length: int, longest: int) -> ParetronError:
    cause = f"an answer of {length} tokens cannot be looked at in a context of {longest}"
    fix = "answers of at least one token that fit into the served context"
    return ParetronError(Problem(Code.UNSUPPORTED, cause, where="evaluate.tasks", fix=fix))
