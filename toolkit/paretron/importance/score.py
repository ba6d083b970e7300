"""Scoring a checkpoint on samples in memory: one pass for widths and influence, then depth."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from paretron.artifacts.headers import DTYPE_BYTES
from paretron.artifacts.journal import Journal
from paretron.artifacts.manifest import MANIFEST, identity, versions
from paretron.artifacts.reader import Checkpoint
from paretron.data.taskfiles import task_sha256 as task_file_sha256
from paretron.errors import Code, ParetronError, Problem
from paretron.families import sizes
from paretron.importance.collect import batches_of, observe
from paretron.importance.criteria import CRITERIA, Importance, Material
from paretron.importance.depth import Evaluator, block_removals, greedy_removal
from paretron.importance.executor import LayerStack
from paretron.importance.measures import LossMeasure, Measure
from paretron.importance.placement import Chosen, choose_placement, load_stack
from paretron.importance.scores import (
    DepthAccuracies,
    DepthLosses,
    ScoredAxis,
    Scores,
    ScoresInfo,
)
from paretron.importance.states import HiddenStates
from paretron.importance.taps import find_taps
from paretron.recipe import Score
from paretron.workers.world import World

OnEvent = Callable[[str, Mapping[str, object]], None]
GRADIENT_BYTES = 4


def score_windows(
    checkpoint: Checkpoint,
    windows: Sequence[torch.Tensor],
    *,
    score: Score,
    block_sizes: Sequence[int] = (),
    seed: int = 0,
    world: World | None = None,
    state: Path | None = None,
    on_event: OnEvent = lambda kind, fields: None,
) -> Scores:
    """Score a checkpoint on samples that are in memory, each a vector of token ids.

    On a CPU the model runs in fp32, on an accelerator in its own dtype; statistics are fp64. The
    processes of `world` take samples in turn and all return the same. In `state` lies what does
    not fit in memory, and what a run that was killed need not do again.
    Errors: USAGE when there are more processes than samples; MEMORY when gradients do not fit;
    those of `observe` and of the criterion.
    """
    world = world or World(0, 1, _this_device())
    own = _own_windows(windows, world)
    measure: Measure | None = None
    if block_sizes and score.depth.metric in ("loss", "task"):
        measure = _measure(checkpoint, windows, score, world)  # what it lacks is said at once
    chosen = choose_placement(
        checkpoint, score.placement, device=world.device, processes=world.size
    )
    if score.needs_gradients(depth=bool(block_sizes)):
        _refuse_without_room(chosen, checkpoint)
    on_event("note", {"message": chosen.message})
    stack = load_stack(checkpoint, chosen, device=world.device)
    states = partial(
        HiddenStates,
        memory_bytes=chosen.states_bytes if chosen.streamed else None,
        folder=state and state / f"hidden-{world.rank}",
    )
    batches = list(batches_of(own, score.micro_batch))
    progress = _Progress(on_event, total=len(own) * len(stack), layers=len(stack))
    with states() as waiting:
        observed = observe(
            stack,
            checkpoint.config,
            batches,
            block_sizes=(1, *block_sizes),
            states=waiting if chosen.streamed else None,
            on_batches=progress.passed,
        ).summed(world.summed)
    material = Material(
        checkpoint, stack, batches, seed=seed, total=world.summed, states=states
    )  # fmt: skip
    by_criterion, found = _by_criteria(material, score, depth=bool(block_sizes), on_event=on_event)
    if measure is not None:
        evaluator = _evaluator(
            stack, measure, checkpoint, windows, score, world, state, states, on_event
        )
        found |= _removals(evaluator, score, block_sizes)
    return Scores(
        ScoresInfo(
            model_type=checkpoint.family.model_type,
            sizes=sizes(checkpoint.family, checkpoint.config),
            model_identity=known_identity(checkpoint.path),
            samples=len(windows),
            tokens=observed.tokens,
            seq_len=max(len(w) for w in windows),
            seed=seed,
            axes=_scored_axes(checkpoint),
            influence=observed.influence(),
            angular=observed.angular(),
            criterion=score.criterion,
            **found,
        ),
        observed.axes,
        by_criterion,
    )


def _by_criteria(
    material: Material, score: Score, *, depth: bool, on_event: OnEvent
) -> tuple[Mapping[str, torch.Tensor], dict[str, Any]]:
    """Units by the recipe's criterion, and what each layer is worth where depth asks for it."""
    metrics = (score.depth.metric,) if depth else ()
    found: dict[str, Importance] = {}
    for name in dict.fromkeys((score.criterion, *metrics)):
        if name in CRITERIA:
            on_event("note", {"message": f"scoring by {name}"})
            found[name] = CRITERIA[name](material)
    values = {m: found[m].layers for m in metrics if m in found}
    layers = {m: tuple(v.tolist()) for m, v in values.items() if v is not None}
    units = found[score.criterion].units if score.criterion in found else {}
    return units, {"layer_values": layers}


def _refuse_without_room(chosen: Chosen, checkpoint: Checkpoint) -> None:
    """MEMORY unless the model fits as a whole beside a gradient in fp32 for every weight."""
    elements = sum(e.nbytes // DTYPE_BYTES[e.dtype] for e in checkpoint.entries.values())
    needed = chosen.weights_bytes + GRADIENT_BYTES * elements
    if chosen.streamed or needed > chosen.memory_bytes:
        raise ParetronError(
            Problem(
                Code.MEMORY,
                f"taylor needs {needed / 1e9:.2f} GB for weights and gradients, there are "
                f"{chosen.memory_bytes / 1e9:.2f} GB",
                where="score",
                fix="another criterion and depth.metric, fewer processes, or more memory",
            )
        )


def known_identity(folder: Path) -> str | None:
    """What an artifact is known by, or None for a folder without a manifest.

    Hashing the weights of a downloaded checkpoint would cost a second read of all of them.
    """
    return identity(folder) if (folder / MANIFEST).is_file() else None


def model_known_by(checkpoint: Checkpoint) -> str:
    """What tells a model from another: its manifest, or its config, file sizes and times."""
    if found := known_identity(checkpoint.path):
        return found
    files = sorted({e.file for e in checkpoint.entries.values()})
    stats = [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files]
    return json.dumps([str(checkpoint.path.absolute()), checkpoint.config, stats], sort_keys=True)


def versions_of_scores() -> dict[str, str | None]:
    """The versions that may change a score."""
    found = versions()
    return {name: found.get(name) for name in ("paretron", "torch", "transformers")}


def _own_windows(windows: Sequence[torch.Tensor], world: World) -> Sequence[torch.Tensor]:
    if not windows:
        raise ParetronError(
            Problem(Code.INPUT_CORPUS, "no calibration sample", fix="name a text that has some")
        )
    if len(windows) < world.size:
        raise ParetronError(
            Problem(
                Code.USAGE,
                f"{len(windows)} samples for {world.size} processes",
                where="score.processes",
                fix="at most one process a sample",
            )
        )
    return windows[world.rank :: world.size]


def _measure(
    checkpoint: Checkpoint, windows: Sequence[torch.Tensor], score: Score, world: World
) -> Measure:
    """What removals are judged by: the loss on the first windows, or the task."""
    if score.depth.task is not None:
        from paretron.importance.tasks import task_measure

        return task_measure(
            checkpoint,
            score.depth.task,
            documents=score.depth.samples,
            micro_batch=score.micro_batch,
            rank=world.rank,
            ranks=world.size,
        )
    if max(map(len, windows[: score.depth.samples])) < 2:
        raise ParetronError(
            Problem(
                Code.INPUT_CORPUS,
                "samples of one token: a loss needs a token and one before it",
                where="data.calibration.seq_len",
                fix="at least 2",
            )
        )
    some = windows[: score.depth.samples][world.rank :: world.size]
    return LossMeasure(list(batches_of(some, score.micro_batch)))


def _evaluator(
    stack: LayerStack,
    measure: Measure,
    checkpoint: Checkpoint,
    windows: Sequence[torch.Tensor],
    score: Score,
    world: World,
    state: Path | None,
    states: Callable[[], HiddenStates],
    on_event: OnEvent,
) -> Evaluator:
    """Removals with a journal, which the leading process reads and writes."""
    known: Mapping[tuple[int, ...], float] = {}
    journal = None
    if world.leads and state is not None:
        of = _depends_on(checkpoint, windows, score)
        journal = Journal(state / "depth.jsonl", of=of, start_over=True)
        known = {tuple(map(int, key)): f["value"] for key, f in journal.known.items()}

    def tell(removed: tuple[int, ...], value: float) -> None:
        if journal is not None:
            journal.add(removed, {"value": value})
        on_event("removal", {"without": list(removed), score.depth.metric: value})

    return Evaluator(
        stack, measure, total=world.summed, known=world.from_leader(known), on_value=tell,
        states=states,
    )  # fmt: skip


def task_sha256(score: Score) -> str | None:
    """The hash of the task that depth is judged by, with its documents, where it is a file."""
    path = score.depth.task_file
    return task_file_sha256(path) if path is not None and path.is_file() else None


def _depends_on(
    checkpoint: Checkpoint, windows: Sequence[torch.Tensor], score: Score
) -> dict[str, object]:
    """All that a removal's value depends on; a checkpoint's files are known by size and time."""
    seen = hashlib.sha256()
    for window in windows[: score.depth.samples]:
        seen.update(window.numpy().tobytes() + b"|")
    return {
        "model": model_known_by(checkpoint),
        "windows": seen.hexdigest(),
        "depth": score.depth.model_dump(mode="json"),
        "task": task_sha256(score),
        "versions": versions_of_scores(),
    }


def _removals(evaluator: Evaluator, score: Score, block_sizes: Sequence[int]) -> dict[str, Any]:
    """Blocks of all sizes asked for, or single layers and then the greedy order of removal."""
    contiguous = score.depth.contiguous
    blocks = block_removals(evaluator, block_sizes=(1, *block_sizes) if contiguous else (1,))
    order = () if contiguous else greedy_removal(evaluator, rounds=max(block_sizes))
    found = DepthLosses(
        samples=score.depth.samples, baseline=blocks.baseline, blocks=blocks.blocks, greedy=order
    )
    if score.depth.task is None:
        return {"losses": found}
    return {"accuracies": DepthAccuracies(task=score.depth.task, **found.model_dump())}


def _this_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _scored_axes(checkpoint: Checkpoint) -> dict[str, ScoredAxis]:
    taps = find_taps(checkpoint.family, checkpoint.config)
    return {
        axis: ScoredAxis(
            taps=tuple(t.name for t in taps if t.axis == axis),
            units=next(t.units for t in taps if t.axis == axis),
        )
        for axis in dict.fromkeys(t.axis for t in taps)
    }


class _Progress:
    """Counts samples as they pass layers."""

    def __init__(self, on_event: OnEvent, *, total: int, layers: int) -> None:
        self._on_event = on_event
        self._total = total
        self._layers = layers
        self._done = 0

    def passed(self, layers: int, samples: int) -> None:
        """So many samples have passed so many layers more."""
        self._done += layers * samples
        done, total = self._done // self._layers, self._total // self._layers
        self._on_event("progress", {"done": done, "total": total, "unit": "samples"})
