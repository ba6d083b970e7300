"""The two stages of a search: which shapes are candidates, and which of them is best."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paretron.artifacts.config import DTYPE_NAMES
from paretron.artifacts.journal import Journal
from paretron.artifacts.jsonfile import dump, read_object
from paretron.artifacts.manifest import Provenance, identity
from paretron.artifacts.reader import Checkpoint
from paretron.artifacts.staging import staged
from paretron.compensate.decide import decide
from paretron.compensate.stage import calibration_windows
from paretron.data.store import TokenStore, sample_windows
from paretron.errors import Code, ParetronError, Problem
from paretron.families import Family, Sizes, sizes
from paretron.importance.collect import batches_of
from paretron.importance.executor import Batch
from paretron.importance.scores import Scores
from paretron.recipe import Calibration, Compensate, Prune, Score, Search
from paretron.search.candidates import (
    Candidate,
    Servable,
    all_hold,
    refuse_none,
    refuse_unfit,
    select,
    shape_words,
)
from paretron.search.costs import measures, most_ms
from paretron.search.frontier import Point, fronts, top
from paretron.search.halving import TrainedLoss, finite, halve
from paretron.search.page import write_page
from paretron.search.resident import PrunedModels, mean_loss, pruned_models
from paretron.search.space import Shapes, ends_of, shapes_of
from paretron.search.table import OperatorTable, given_table, predicted_ms
from paretron.search.timing import LayerTimer, grid_points

CANDIDATES, SEARCH, TABLE = "candidates.json", "search.json", "table.json"
OnEvent = Callable[[str, Mapping[str, object]], None]


def find_candidates(
    config: Mapping[str, Any],
    *,
    family: Family,
    dtype: str,
    search: Search,
    servable: Servable,
    where: str,
    out: Path,
    provenance: Provenance,
    overwrite: bool = False,
    on_event: OnEvent,
) -> list[Candidate]:
    """Enumerate the space of a teacher's `config` and publish the candidates at `out`.

    `dtype` is the students' torch name. A budget of speed without a table has the shapes timed
    here, both ends of the space first. Errors: RECIPE_TARGET naming the nearest reachable shape,
    RECIPE_VALUE when more candidates are left than may be ranked.
    """
    shapes = shapes_of(search.space, sizes(family, config))
    told: dict[str, Any] = {"family": family, "config": config, "dtype": _SHORT[dtype]}
    with staged(out, provenance=provenance, overwrite=overwrite) as folder:
        counted = measures(search.budget, shapes, **told)
        refuse_none(where, shapes, counted)
        table = None
        if search.budget.speed is not None:
            within = shapes.of(all_hold(shapes, counted))
            timer = LayerTimer(family, config, dtype, search.budget.speed)
            table = _table(timer, within, where=where, on_event=on_event)
            table.save(folder / TABLE)
        budget = measures(search.budget, shapes, table=table, **told)
        refuse_none(where, shapes, budget)
        found = select(shapes, budget, servable=servable, widest=search.widest)
        refuse_unfit(where, found, search)
        dump(
            folder / CANDIDATES,
            {
                "schema": 1,
                "shapes": len(shapes),
                "ends": ends_of(shapes),
                "bounds": {m.name: {"at_least": m.at_least, "at_most": m.at_most} for m in budget},
                "candidates": [c.as_json() for c in found],
            },
        )
    return found


_SHORT = {name: short for short, name in DTYPE_NAMES.items()}  # "bfloat16" -> "BF16"


def _table(timer: LayerTimer, shapes: Shapes, *, where: str, on_event: OnEvent) -> OperatorTable:
    """The recipe's table, or one measured here: both ends first, the rest if they can be had."""
    speed = timer.speed
    given = given_table(speed, model_type=timer.family.model_type, dtype=timer.dtype)
    if given is not None:
        return given
    shallow = shapes.of(shapes.sizes["layers"] == shapes.sizes["layers"].min())
    found = []
    for size in (*ends_of(shapes), ends_of(shallow)[0]):
        one = Shapes({axis: np.array([n]) for axis, n in size.items()})
        ms = float(predicted_ms(timer.table(one), one, speed)[0])
        on_event("note", {"message": f"{ms:.4g} ms with {shape_words(size)}"})
        found.append((ms, size))
    ms, size = min(found, key=lambda f: f[0])
    if not ms <= most_ms(speed):
        raise ParetronError(
            Problem(
                Code.RECIPE_TARGET,
                f"at most {most_ms(speed):.4g} ms asked for, the smallest shape takes {ms:.4g}",
                where=f"{where}.budget.speed",
                fix=f"nearest reachable: {ms:.4g} ms with {shape_words(size)}",
            )
        )
    return timer.table(grid_points(shapes), on_event=on_event)


@dataclass(frozen=True)
class Ranked:
    """What a ranking reads: the model to prune, its scores, held-out windows and their length.

    `calibration` is the token store by whose windows students are compensated.
    """

    model: Path
    scores: Path
    tokens: Path
    seq_len: int
    seed: int
    calibration: Path
    calibration_settings: Calibration


def search_student(
    inputs: Ranked,
    candidates: Path,
    *,
    search: Search,
    prune: Prune,
    score: Score,
    compensate: Compensate,
    trained_loss: Callable[[Mapping[str, Sizes]], TrainedLoss],
    state: Path,
    out: Path,
    provenance: Provenance,
    overwrite: bool = False,
    on_event: OnEvent,
) -> None:
    """Rank the candidates without training, halve the best, publish search.json and a page.

    `trained_loss` is given the shapes by key and trains one of them; every result is kept in
    `state` as it comes. Errors: GATE_NONFINITE when no candidate has a finite loss, RECIPE_TARGET,
    INPUT_CORPUS, and those of training.
    """
    found = read_object(candidates / CANDIDATES, code=Code.INPUT_MANIFEST)
    shapes = {c.key: c for c in map(Candidate.from_json, found["candidates"])}
    of = {"settings": dict(provenance.settings), "parents": dict(provenance.parents)}
    journal = Journal(state / "journal.jsonl", of=of | {"candidates": identity(candidates)})
    losses = _rank(inputs, shapes, search, prune, score, compensate, journal, on_event)
    points = [Point(key, losses[key], shapes[key].costs) for key in shapes]
    # A cap says what may be spent: below it, a cheaper shape is no better. A range asks for both.
    ranged = {name for name, bound in found["bounds"].items() if bound["at_least"] is not None}
    kept = top(points, search.keep, over=ranged)
    train = trained_loss({p.key: shapes[p.key].sizes for p in kept})
    halved = halve(kept, search.rounds, trained_loss=train, journal=journal)
    front = {p.key: k for k, some in enumerate(fronts(points, over=found["bounds"])) for p in some}
    rows = [
        {
            **shapes[p.key].as_json(),
            "words": shape_words(shapes[p.key].sizes),
            "loss": p.loss,
            "front": front.get(p.key),
            "rounds": list(halved.rounds.get(p.key, ())),
            "chosen": p.key == halved.winner.key,
        }
        for p in sorted(points, key=lambda p: (_last(halved.rounds.get(p.key)), _key(p)))
    ]
    result = {
        "schema": 1,
        "choice": dict(shapes[halved.winner.key].sizes),
        "bounds": found["bounds"],
        "shapes": found["shapes"],
        "ranked_on": {"text": "validation", "windows": search.samples, "seq_len": inputs.seq_len},
        "rounds": list(search.rounds),
        "candidates": rows,
    }
    with staged(out, provenance=provenance, overwrite=overwrite) as folder:
        dump(folder / SEARCH, result)
        write_page(result, folder)


def chosen_sizes(folder: Path) -> dict[str, int]:
    """The sizes that a finished search chose; INPUT_MANIFEST when the folder holds none."""
    if not (folder / SEARCH).is_file():
        fix = "name what a search wrote"
        raise ParetronError(
            Problem(Code.INPUT_MANIFEST, f"no {SEARCH} here", where=str(folder), fix=fix)
        )
    choice = read_object(folder / SEARCH, code=Code.INPUT_MANIFEST)["choice"]
    return {axis: int(size) for axis, size in choice.items()}


def _rank(
    inputs: Ranked,
    shapes: Mapping[str, Candidate],
    search: Search,
    prune: Prune,
    score: Score,
    compensate: Compensate,
    journal: Journal,
    on_event: OnEvent,
) -> dict[str, float | None]:
    """The loss of every candidate right after pruning; what the journal knows is not run again."""
    # As many heads follow each other, so that their copies are made once.
    order = sorted(
        shapes, key=lambda k: (shapes[k].sizes["kv_heads"], shapes[k].sizes["q_per_kv"], k)
    )
    models: PrunedModels | None = None
    windows = None
    losses: dict[str, float | None] = {}
    for done, key in enumerate(order, start=1):
        figures = journal.known.get(("rank", key))
        if figures is None:
            if models is None or windows is None:
                checkpoint, scores = Checkpoint.open(inputs.model), Scores.load(inputs.scores)
                narrowest = min((c.sizes for c in shapes.values()), key=lambda s: s["hidden"])
                models = pruned_models(
                    checkpoint, scores, score=score, prune=prune,
                    decision=decide(
                        checkpoint.family, checkpoint.config, new=narrowest, settings=compensate,
                        sizes=sizes(checkpoint.family, checkpoint.config),
                    ),
                    calibration=_calibration(inputs, compensate, search.micro_batch),
                )  # fmt: skip
                store = TokenStore.open(inputs.tokens)
                windows = list(sample_windows(store, search.samples, inputs.seq_len, inputs.seed))
            model = models.model(shapes[key].sizes)
            loss = mean_loss(model, windows, micro_batch=search.micro_batch)
            figures = journal.add(("rank", key), finite(loss))
        losses[key] = figures["loss"]
        on_event("progress", {"done": done, "total": len(order), "unit": "shapes"})
    return losses


def _calibration(inputs: Ranked, compensate: Compensate, micro_batch: int) -> list[Batch]:
    windows = calibration_windows(
        inputs.calibration,
        settings=inputs.calibration_settings,
        compensate=compensate,
        seed=inputs.seed,
    )
    return list(batches_of(windows, micro_batch))


def _last(rounds: tuple[float | None, ...] | None) -> tuple[int, float]:
    """Who came further stands before, then who has the lower loss."""
    if not rounds or rounds[-1] is None:
        return 0, 0.0
    return -len(rounds), rounds[-1]


def _key(point: Point) -> tuple[bool, float, str]:
    return (point.loss is None, point.loss or 0.0, point.key)
