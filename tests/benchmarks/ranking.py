"""How well rankings without training agree with short distillation, as JSON: a model and texts.

python tests/benchmarks/ranking.py --model MODEL --texts FOLDER --out RUNS

FOLDER holds gsm8k-train.jsonl and speeches.jsonl; without MODEL there is nothing to measure. Of all
shapes with as many parameters at most as a hand-picked one, those that each ranking puts first and
some that are drawn are compensated and distilled, all on the same windows. Everything is measured
on windows from the end of GSM8K's training text, of which training sees at most a few. Rank
correlations are Spearman's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paretron.artifacts.models import load_model, load_tokenizer
from paretron.artifacts.reader import Checkpoint
from paretron.compensate.decide import decide
from paretron.compensate.samples import Samples
from paretron.compensate.student import Student
from paretron.data.sources import read_documents
from paretron.data.store import TokenStore, sample_windows
from paretron.data.tokens import build_token_store
from paretron.distill.batches import Windows
from paretron.distill.loop import Trainer
from paretron.distill.objective import Objective, Teacher
from paretron.distill.state import StateFolder
from paretron.families import parameter_counts, sizes
from paretron.families.table import with_sizes
from paretron.importance.collect import batches_of
from paretron.importance.score import score_windows
from paretron.importance.scores import Scores
from paretron.recipe import Budget, Compensate, Distill, Prune, Score, Space, TextSource
from paretron.recipe.searching import Limit
from paretron.search.candidates import Candidate, select, shape_words
from paretron.search.costs import measures
from paretron.search.resident import Resident, mean_loss
from paretron.search.rotated import principal_rotation
from paretron.search.space import shapes_of
from paretron.surgery.selection import choose
from paretron.workers.stop import StopRequest
from paretron.workers.world import World

SEQ_LEN, BATCH, HELD = 128, 8, 32
SPACE: dict[str, Any] = {
    "layers": {"from": 4, "to": 8},
    "hidden": {"from": 96, "to": 192, "multiple": 16},
    "ffn": {"from": 128, "to": 512, "multiple": 32},
    "heads": [3, 6],
}
HAND = {"hidden": 144, "ffn": 320}
POINTS = (15, 60)  # steps of one schedule after which the loss is measured
SCORE = Score.model_validate({"depth": {"samples": 32}})


def main() -> None:
    """Print one JSON object: a row a candidate, and the rank correlation of every two columns."""
    parser = argparse.ArgumentParser()
    for name in ("model", "texts", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--trained", type=int, default=18, help="candidates to distil")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if not asked.model.is_dir():
        print(f"no model at {asked.model}: nothing measured", file=sys.stderr)
        return
    checkpoint = Checkpoint.open(asked.model)
    stores = _stores(asked)
    names = ("gsm8k-train", "speeches")
    drawn = torch.cat([sample_windows(stores[n], 64, SEQ_LEN, asked.seed) for n in names])
    last = stores["gsm8k-train"].windows(SEQ_LEN)
    held = [stores["gsm8k-train"].window(last - 1 - 15 * k, SEQ_LEN) for k in range(HELD)]
    batches = list(batches_of(list(drawn), 2 * BATCH))
    scores = score_windows(checkpoint, list(drawn), score=SCORE, block_sizes=(1, 2, 3, 4))
    rotation = principal_rotation(load_model(asked.model), batches)
    residents = {
        "channels": Resident(checkpoint, scores, score=SCORE, merge_heads=False),
        "rotated": Resident(checkpoint, scores, score=SCORE, merge_heads=False, rotation=rotation),
    }
    candidates = _candidates(checkpoint)
    rows: dict[str, dict[str, Any]] = {}
    for c in candidates:
        losses = {
            way: mean_loss(resident.model(c.sizes), held, micro_batch=BATCH)
            for way, resident in residents.items()
        }
        rows[c.key] = {"words": shape_words(c.sizes), **losses}
    for c in _picked(candidates, rows, asked.trained, asked.seed):
        rows[c.key] |= _trained(asked, checkpoint, scores, c, batches, held, stores["train"])
        print(rows[c.key], file=sys.stderr, flush=True)
    trained = [row for row in rows.values() if "compensated" in row]
    columns = [name for name in trained[0] if name != "words"]
    ranks = np.array([[row[name] for row in trained] for name in columns]).argsort().argsort()
    found = np.array(np.corrcoef(ranks))
    correlation = {
        a: {b: round(float(found[i, j]), 3) for j, b in enumerate(columns)}
        for i, a in enumerate(columns)
    }
    print(json.dumps({"trained": trained, "rank_correlation": correlation, "rows": rows}, indent=1))


def _stores(asked: argparse.Namespace) -> dict[str, TokenStore]:
    """Tokens of both texts, alone and together."""
    tokenizer = load_tokenizer(asked.model)
    texts_of = {"gsm8k-train": ("gsm8k-train",), "speeches": ("speeches",)}
    stores = {}
    for name, texts in (texts_of | {"train": ("gsm8k-train", "speeches")}).items():
        documents = (
            d
            for text in texts
            for d in read_documents(TextSource(path=str(asked.texts / f"{text}.jsonl")))
        )
        stores[name] = build_token_store(
            documents, tokenizer, asked.out / f"tokens-{name}",
            eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
    return stores


def _candidates(checkpoint: Checkpoint) -> list[Candidate]:
    """The widest shapes of every kind with as many parameters as the hand-picked one at most."""
    family, config = checkpoint.family, checkpoint.config
    have = sizes(family, config)
    layers = tuple(range(have["layers"]))
    hand = with_sizes(family, config, {**have, **HAND}, kept_layers=layers)
    budget = Budget(params=Limit(at_most=parameter_counts(family, hand).total))
    shapes = shapes_of(Space.model_validate(SPACE), have)
    costs = measures(budget, shapes, family=family, config=config, dtype="F32")
    return select(shapes, costs, servable=lambda size: True, widest=True)


def _picked(
    candidates: Sequence[Candidate], rows: dict[str, dict[str, Any]], count: int, seed: int
) -> list[Candidate]:
    """The first 4 by channels and the first 6 by rotation, and others drawn."""
    first = [
        *sorted(candidates, key=lambda c: rows[c.key]["channels"])[:4],
        *sorted(candidates, key=lambda c: rows[c.key]["rotated"])[:6],
    ]
    drawn = np.random.default_rng(seed).permutation(len(candidates))
    found = {c.key: c for c in (*first, *(candidates[k] for k in drawn))}
    return list(found.values())[:count]


def _trained(
    asked: argparse.Namespace,
    checkpoint: Checkpoint,
    scores: Scores,
    candidate: Candidate,
    batches: Sequence[Any],
    held: Sequence[torch.Tensor],
    train: TokenStore,
) -> dict[str, float]:
    """The loss of the compensated student, and after some steps of distillation."""
    have, settings = sizes(checkpoint.family, checkpoint.config), Compensate()
    decision = decide(
        checkpoint.family, checkpoint.config, sizes=have, new=candidate.sizes, settings=settings
    )
    student = Student.of(
        checkpoint, choose(scores, sizes=candidate.sizes, score=SCORE), sizes=candidate.sizes,
        prune=Prune(dtype="float32"), decision=decision, ridge=settings.ridge, seed=asked.seed,
    )  # fmt: skip
    world = World(0, 1, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "student"
        folder.mkdir()
        student.write(folder, Samples(tuple(batches), tuple(batches[:1])))
        model = load_model(folder)
        found = {"compensated": mean_loss(model, held, micro_batch=BATCH)}
        trainer = Trainer(
            objective=Objective(model),
            teacher=Teacher(load_model(asked.model)),
            alpha="dynamic",
            train_windows=Windows(train, SEQ_LEN, model.config.vocab_size),
            validation_windows=None,
            settings=Distill(
                tokens=POINTS[-1] * BATCH * SEQ_LEN, lr=1e-3, min_lr=1e-5, warmup_steps=5,
                global_batch=BATCH, micro_batch=BATCH, dtype="float32",
            ),
            seed=asked.seed,
            world=world,
            state=StateFolder(Path(place) / "state", {}, world, _silent),
            stop=StopRequest(),
            on_event=_silent,
        )  # fmt: skip
        for point in POINTS:
            while trainer.step < point:
                trainer.train_step()
            found[f"step {point}"] = mean_loss(model, held, micro_batch=BATCH)
    return found


def _silent(kind: str, fields: object) -> None:
    """Nobody watches."""


if __name__ == "__main__":
    main()
