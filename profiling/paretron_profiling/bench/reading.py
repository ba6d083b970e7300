"""What one run of another tool's benchmark says, in our terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from paretron.errors import Code, ParetronError, Problem
from paretron_profiling.bench.fields import Fields
from paretron_profiling.schema import FIGURES, VARIED, Sample, Workload

# Random prompts of other tools drift by some tokens: they are made as text.
DRIFT = 0.05


@dataclass(frozen=True)
class Stated:
    """What a person, or we as the caller, know of a run that its result file may leave out."""

    mode: str | None = None
    load: float | None = None
    input_len: int | None = None
    output_len: int | None = None
    warmup: int | None = None


@dataclass(frozen=True)
class Reading:
    """One run of a workload as a result file tells it.

    `figures` are by the names of schema.FIGURES; one that the file does not state is absent, and so
    is a latency of which it states only the mean. `percentiles` likewise, by latency. `requests`
    were sent in `seconds`, `failed` of them not answered. `warmup` is None where the file does not
    say whether runs were discarded before. `sample` holds the raw times where the file has them.
    """

    work: Workload
    figures: Mapping[str, float]
    requests: int
    failed: int
    seconds: float
    warmup: int | None
    percentiles: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    sample: Sample | None = None
    flags: tuple[str, ...] = ()
    about: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @classmethod
    def of_sample(
        cls,
        work: Workload,
        sample: Sample,
        *,
        warmup: int | None,
        flags: tuple[str, ...],
        about: Mapping[str, str],
        notes: tuple[str, ...] = (),
    ) -> Reading:
        """The reading of raw times: every figure follows from them."""
        figures = {name: figure(sample, work) for name, figure in FIGURES.items()}
        return cls(
            work,
            {name: value for name, value in figures.items() if value is not None},
            requests=sample.completed + len(sample.failures),
            failed=len(sample.failures),
            seconds=sample.total_s,
            warmup=warmup,
            sample=sample,
            flags=flags,
            about=about,
            notes=notes,
        )


@dataclass(frozen=True)
class Tokens:
    """How long the prompts, or the answers, of a file's requests are."""

    mean: float
    least: float
    most: float

    @classmethod
    def of(cls, lengths: Sequence[float]) -> Tokens:
        """Those of the requests one by one; of the mean alone, where that is all there is."""
        return cls(sum(lengths) / len(lengths), min(lengths), max(lengths))


@dataclass(frozen=True)
class Lengths:
    """Prompt and answer in tokens, and whether some request had others."""

    input_len: int
    output_len: int
    flags: tuple[str, ...]


def lengths_of(
    fields: Fields, *, inputs: Tokens | None, outputs: Tokens | None, stated: Stated
) -> Lengths:
    """The lengths of a workload: those stated, or else what its requests have in the mean.

    `inputs` and `outputs` are None where the file does not tell. A file that contradicts what was
    stated is INPUT_CONFIG; one that says nothing where nothing was stated, USAGE.
    """
    output_len = _length(fields, "output", outputs, stated.output_len)
    input_len = _length(fields, "input", inputs, stated.input_len)
    varied = inputs is not None and (
        max(inputs.most - input_len, input_len - inputs.least) > DRIFT * input_len
    )
    varied |= outputs is not None and not (outputs.least == outputs.most == output_len)
    return Lengths(input_len, output_len, (VARIED,) if varied else ())


def load_of(
    fields: Fields, found: tuple[str, float] | None, *, stated: Stated, key: str
) -> tuple[str, float]:
    """Mode and load of a workload: what the file tells under `key`, or else what was stated."""
    said = (stated.mode, stated.load)
    if stated.mode is None or stated.load is None:
        if found is None:
            raise _unsaid(fields, "the load", "--concurrency, --rate or --batch")
        return found
    if found is not None and found != said:
        mode, load = found
        raise fields.refused(
            key, f"{mode} {load:g}, but {stated.mode} {stated.load:g} was asked for"
        )
    return stated.mode, stated.load


def _length(fields: Fields, side: str, found: Tokens | None, stated: int | None) -> int:
    if stated is None:
        if found is None:
            raise _unsaid(fields, f"the {side} length", f"--{side}-len")
        if found.mean < 1:
            raise fields.refused(f"the mean {side} length", f"{found.mean:g} tokens")
        return round(found.mean)
    if found is not None and abs(found.mean - stated) > DRIFT * stated:
        raise fields.refused(
            f"the mean {side} length", f"{found.mean:g} tokens, but {stated} were asked for"
        )
    return stated


def _unsaid(fields: Fields, what: str, option: str) -> ParetronError:
    return ParetronError(
        Problem(
            Code.USAGE,
            f"a result file of {fields.tool} does not tell {what}",
            where=fields.file,
            fix=f"say it with {option}",
        )
    )
