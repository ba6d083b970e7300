"""What a training does next, as a function of how far it is: windows, batch and learning rate.

A training runs through phases, most have one. Its place is a count of tokens within a phase, not a
number of steps, so it goes on from there with a larger or smaller batch and misses nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from paretron.data.order import Stretch
from paretron.errors import Code, Problem, raise_all
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

    @property
    def block_len(self) -> int:
        """Phases share out blocks of so many tokens: the longest window."""
        return max(leg.seq_len for leg in self.legs)

    def leg(self, place: Place) -> Leg:
        """The phase of the next step."""
        return self.legs[place.phase]

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
