"""What a training does next, as a function of how far it is: windows, batch and learning rate.

A training runs through phases, most have one. Its place is a count of tokens within a phase, not a
number of steps, so it goes on from there with a larger or smaller batch and misses nothing. One
without stated phases may go on in windows of another length too: the history says what was read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from paretron.data.order import Stretch
from paretron.data.unread import Continuation
from paretron.errors import Code, ParetronError, Problem, raise_all
from paretron.recipe import Distill, Training
from paretron.recipe.training import Phase


@dataclass(frozen=True)
class Place:
    """How far a training is: the phase, counted from 0, and the tokens that were seen in it."""

    phase: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Leg:
    """A phase with all that it leaves out filled in; without an `lr` it goes on along a curve."""

    seq_len: int
    tokens: int
    global_batch: int
    micro_batch: int
    lr: float | None
    min_lr: float

    @property
    def tokens_per_step(self) -> int:
        """Over all processes."""
        return self.global_batch * self.seq_len

    def steps(self, *, after: int = 0) -> int:
        """Whole steps that there are after so many tokens."""
        return (self.tokens - after) // self.tokens_per_step


@dataclass(frozen=True)
class Schedule:
    """The phases of a training, one after the other."""

    legs: tuple[Leg, ...]
    warmup_steps: int
    continuation: Continuation | None = None  # of a text that was begun in other windows,
    begins: int = 0  # and how many tokens were read of it in those

    @classmethod
    def of(cls, settings: Training, *, seq_len: int) -> Schedule:
        """A training's schedule; RECIPE_VALUE when a phase holds not even one step."""
        phases = settings.phases if isinstance(settings, Distill) else ()
        legs = tuple(
            Leg(
                phase.seq_len,
                phase.tokens,
                phase.global_batch or settings.global_batch,
                phase.micro_batch or settings.micro_batch,
                phase.lr if number else phase.lr or settings.lr,
                settings.min_lr if phase.min_lr is None else phase.min_lr,
            )
            for number, phase in enumerate(
                phases or (Phase(seq_len=seq_len, tokens=settings.tokens),)
            )
        )
        raise_all(
            [
                Problem(
                    Code.RECIPE_VALUE,
                    f"{leg.tokens} tokens are less than one step of {leg.tokens_per_step}",
                    where=f"phases.{number}.tokens" if phases else "tokens",
                    fix="more tokens, or a smaller global_batch",
                )
                for number, leg in enumerate(legs)
                if not leg.steps()
            ]
        )
        return cls(legs, settings.warmup_steps)

    def first(self, tokens: int, *, lr: float, min_lr: float, warmup_steps: int) -> Schedule:
        """The steps of the first `tokens` tokens on one curve of their own.

        RECIPE_VALUE when they hold not even one step.
        """
        legs: list[Leg] = []
        for leg in self.legs:
            share = min(leg.tokens, tokens - sum(each.tokens for each in legs))
            legs.append(replace(leg, tokens=share, lr=None if legs else lr, min_lr=min_lr))
        if not legs[0].steps():
            step = legs[0].tokens_per_step
            raise ParetronError(
                Problem(
                    Code.RECIPE_VALUE,
                    f"{tokens} tokens are less than one step of {step}",
                    where="correct.tokens",
                    fix="more tokens, or a smaller distill.global_batch",
                )
            )
        return Schedule(tuple(legs), warmup_steps)

    @property
    def block_len(self) -> int:
        """Phases share out blocks of so many tokens: the longest window."""
        return max(leg.seq_len for leg in self.legs)

    def leg(self, place: Place) -> Leg:
        """The phase of the next step."""
        return self.legs[place.phase]

    def resumed(
        self, steps: Sequence[Mapping[str, float]], *, num_tokens: int, seed: int
    ) -> Schedule:
        """The same after these steps of a text of `num_tokens`, whatever windows they read."""
        if len(self.legs) > 1:
            return self
        read = lengths_of(steps)
        if read and read[-1][0] == self.legs[0].seq_len:
            read.pop()  # what this length has read already
        if not read:
            return self
        windows = ((seq_len, tokens // seq_len) for seq_len, tokens in read)
        continuation = Continuation.after(windows, num_tokens=num_tokens, seed=seed)
        begins = sum(tokens for _, tokens in read)
        return replace(self, continuation=continuation, begins=begins)

    def entered(self, place: Place) -> Place:
        """The same, or the start of the next phase where this one has no whole step left.

        After the last step that is a phase which does not exist.
        """
        while place.phase < len(self.legs) and not self.leg(place).steps(after=place.tokens):
            place = Place(place.phase + 1)
        return place

    def after(self, place: Place) -> Place:
        """The place after one more step."""
        return self.entered(replace(place, tokens=place.tokens + self.leg(place).tokens_per_step))

    def left(self, place: Place) -> tuple[int, int]:
        """How many steps there are still to do, and how many tokens they see."""
        steps = [leg.steps() for leg in self.legs]
        if place.phase < len(steps):
            steps[place.phase] = self.leg(place).steps(after=place.tokens)
        to_do = list(zip(steps, self.legs, strict=True))[place.phase :]
        return sum(n for n, _ in to_do), sum(n * leg.tokens_per_step for n, leg in to_do)

    def window_ids(self, place: Place, *, num_blocks: int, seed: int) -> list[int]:
        """The windows of the next step, in the phase's own numbers; no epoch shows a token twice.

        Blocks of `block_len` tokens come in an order by seed; each phase takes as many as its
        tokens fill. So at most one block is left out where one phase follows another.
        """
        leg = self.leg(place)
        if self.continuation is not None:
            first = (place.tokens - self.begins) // leg.seq_len
            return [
                self.continuation.window_id(sample, seq_len=leg.seq_len, seed=seed)
                for sample in range(first, first + leg.global_batch)
            ]
        counts = [-(-each.tokens // self.block_len) for each in self.legs]
        stretch = Stretch(
            first=sum(counts[: place.phase]),
            count=counts[place.phase],
            per_block=self.block_len // leg.seq_len,
        )
        first = place.tokens // leg.seq_len
        return [
            stretch.window_id(sample, num_blocks=num_blocks, seed=seed)
            for sample in range(first, first + leg.global_batch)
        ]

    def learning_rate(self, place: Place) -> float:
        """The learning rate of the next step, on the curve that its phase is part of.

        Steps are counted as if all of a phase's had been as large as they are now.
        """
        begins = [k for k, leg in enumerate(self.legs) if leg.lr is not None]
        begin = max(k for k in begins if k <= place.phase)
        end = min((k for k in begins if k > place.phase), default=len(self.legs))
        leg, peak = self.leg(place), self.legs[begin].lr
        assert peak is not None
        step = place.tokens / leg.tokens_per_step
        step += sum(each.steps() for each in self.legs[begin : place.phase])
        later = sum(each.steps() for each in self.legs[place.phase + 1 : end])
        return learning_rate(
            step,
            steps=step + leg.steps(after=place.tokens) + later,
            peak=peak,
            floor=self.legs[begin].min_lr,
            warmup_steps=0 if begin else self.warmup_steps,
        )


def place_after(steps: Sequence[Mapping[str, float]]) -> Place:
    """Where a training is after the steps of its history."""
    if not steps:
        return Place()
    phase = steps[-1].get("phase", 0)
    before = [step["tokens"] for step in steps if step.get("phase", 0) != phase]
    return Place(int(phase), int(steps[-1]["tokens"] - max(before, default=0)))


def lengths_of(steps: Sequence[Mapping[str, float]]) -> list[tuple[int, int]]:
    """The lengths of windows that a history read one after the other, and the tokens in each."""
    found: list[tuple[int, int]] = []
    seen = 0
    for step in steps:
        length, now = int(step["seq_len"]), int(step["tokens"])
        before = found.pop()[1] if found and found[-1][0] == length else 0
        found.append((length, before + now - seen))
        seen = now
    return found


def learning_rate(
    step: float, *, steps: float, peak: float, floor: float, warmup_steps: int
) -> float:
    """Linear warm-up to `peak`, then half a cosine down to `floor` at the last step.

    `step` counts from 0. The first step already moves, the last one learns at the floor; a
    warm-up longer than the training simply never ends. Paper 2, section 3 (hyperparameters).
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    last = steps - 1
    done = (step - warmup_steps) / (last - warmup_steps) if last > warmup_steps else 1.0
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))
