"""A checkpoint that transformers runs, answering the questions of tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from paretron.data.answers import SEED, Tokens
from paretron.families import LogitRule, family_of, logit_rule

OnEvent = Callable[[str, Mapping[str, object]], None]

_LOGITS_AT_ONCE = 1 << 24  # elements: 64 MB in float32, whatever the vocabulary
_LONGEST = 2048  # lm-eval's own, where a config says nothing


@dataclass(frozen=True)
class ModelAsker:
    """An `Asker` of a loaded model, which reads `micro_batch` texts at once."""

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    micro_batch: int
    on_event: OnEvent

    @property
    def max_length(self) -> int:
        """The model's context."""
        return int(getattr(self.network.config, "max_position_embeddings", None) or _LONGEST)

    @torch.inference_mode()
    def log_likelihoods(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[tuple[float, bool]]:
        """Nats of each pair's second after its first, and whether it is what greedy would say.

        What only differs in its last token is run once.
        """
        found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        run: dict[tuple[int, ...], list[int]] = {}
        for number, (first, second) in enumerate(pairs):
            whole = (*first, *second)[-(self.max_length + 1) :]
            run.setdefault(whole[:-1], []).append(number)
        # Texts of about one length pad each other least.
        rows = sorted(run, key=len, reverse=True)
        done = 0
        for start in range(0, len(rows), self.micro_batch):
            some = rows[start : start + self.micro_batch]
            for row, hidden_TD in zip(some, self._hidden(some), strict=True):
                seconds = {number: pairs[number][1] for number in run[row]}
                for number, answer in self._compared(hidden_TD[: len(row)], seconds):
                    found[number] = answer
                done += len(seconds)
            self.on_event("progress", {"done": done, "total": len(pairs), "unit": "answers"})
        return found

    def _hidden(self, rows: Sequence[tuple[int, ...]]) -> torch.Tensor:
        """The final norm's output, [rows, longest, hidden]; rows are padded at their end."""
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True)
        out: Any = self.network.get_decoder()(
            input_ids=ids.to(self.network.device), use_cache=False
        )
        hidden: torch.Tensor = out.last_hidden_state
        return hidden

    def _compared(
        self, hidden_TD: torch.Tensor, seconds: Mapping[int, Tokens]
    ) -> Iterator[tuple[int, tuple[float, bool]]]:
        """What the last states of one text say of every text that might stand there."""
        longest = max(map(len, seconds.values()))
        head, positions = self.network.get_output_embeddings(), hidden_TD[-longest:]
        at_once = max(1, _LOGITS_AT_ONCE // self.network.config.vocab_size)
        logs = torch.cat(
            [
                torch.log_softmax(self._rule(head(part).float()), dim=-1)
                for part in positions.split(at_once)
            ]
        )
        likeliest = logs.argmax(dim=-1)
        for number, second in seconds.items():
            targets = torch.tensor(second, device=logs.device)
            own = logs[-len(second) :].gather(1, targets[:, None])
            greedy = bool((likeliest[-len(second) :] == targets).all())
            yield number, (float(own.sum(dtype=torch.float64)), greedy)

    @cached_property
    def _rule(self) -> LogitRule:
        config = self.network.config.to_dict()
        return logit_rule(family_of(config), config)

    def generate(
        self,
        prompts: Sequence[Tokens],
        *,
        max_tokens: int,
        until: Sequence[str],
        temperature: float,
        top_p: float,
    ) -> list[str]:
        """A text after each prompt, cut before the first of `until`; drawn by a seed of its own."""
        torch.manual_seed(SEED)
        texts: list[str] = [""] * len(prompts)
        room = self.max_length - max_tokens
        order = sorted(range(len(prompts)), key=lambda k: len(prompts[k]), reverse=True)
        settings = self._settings(max_tokens, until, temperature, top_p)
        self.network.generation_config = settings  # the folder's own would fill in what is not said
        for start in range(0, len(order), self.micro_batch):
            numbers = order[start : start + self.micro_batch]
            ids, mask = self._padded([prompts[k][-room:] for k in numbers])
            with torch.inference_mode():
                out = self.network.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    generation_config=settings,
                    tokenizer=self.tokenizer,
                )
            for k, row in zip(numbers, out[:, ids.shape[1] :].tolist(), strict=True):
                texts[k] = cut(self.tokenizer.decode(row, skip_special_tokens=True), until)
            done = start + len(numbers)
            self.on_event("progress", {"done": done, "total": len(prompts), "unit": "answers"})
        return texts

    def _settings(
        self, max_tokens: int, until: Sequence[str], temperature: float, top_p: float
    ) -> GenerationConfig:
        drawn = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
        return GenerationConfig(
            max_new_tokens=max_tokens,
            do_sample=bool(temperature),
            stop_strings=list(until) or None,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self._pad,
            **drawn,
        )

    def _padded(self, prompts: Sequence[Tokens]) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts as ids and mask, padded at their start, where generation does not go on."""
        ids = torch.full((len(prompts), max(map(len, prompts))), self._pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, -len(prompt) :] = torch.tensor(prompt)
            mask[row, -len(prompt) :] = 1
        return ids.to(self.network.device), mask.to(self.network.device)

    @property
    def _pad(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first place where one of `until` begins."""
    ends = [place for stop in until if (place := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text
