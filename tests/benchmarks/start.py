"""Distillation from a trimmed and from a compensated start, same data, as JSON: a model and texts.

python tests/benchmarks/start.py --model MODEL --texts FOLDER --out CURVES

FOLDER holds gsm8k-train.jsonl, speeches.jsonl, gsm8k-test.jsonl and wikitext2-test.txt; without
MODEL there is nothing to measure. The student keeps three quarters of the hidden size and five
eighths of the MLP. A seed draws the calibration windows and the order of the training text. Every
curve is appended to CURVES/curves.jsonl when it is whole; run again to go on.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
from paretron.evaluate.perplexity import summed_loss
from paretron.families import sizes
from paretron.importance.collect import batches_of
from paretron.importance.score import score_windows
from paretron.recipe import Compensate, Distill, Prune, Score, TextSource
from paretron.surgery.selection import choose
from paretron.workers.stop import StopRequest
from paretron.workers.world import World

SEQ_LEN, SCORED_AT_ONCE = 256, 16
POINTS = (0, 10, 25, 50, 60, 100, 150, 200)  # steps after which the loss is measured
WAYS = {"plain": Compensate(rotate=False, refit=False), "compensated": Compensate()}
CALIBRATION, MEASURED = ("gsm8k-train", "speeches"), ("gsm8k-test", "wikitext2-test")
Curve = dict[str, Any]  # way, seed, and each measured text's losses at POINTS


def main() -> None:
    """Print one JSON object: the curves, their means and spreads, and steps to equal loss."""
    parser = argparse.ArgumentParser()
    for name in ("model", "texts", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="*", default=(0, 1, 2))
    parser.add_argument("--calibration", type=int, default=128, help="windows of each of two texts")
    parser.add_argument("--measured", type=int, default=200, help="windows of each test text")
    parser.add_argument("--batch", type=int, default=16, help="windows a step")
    asked = parser.parse_args()
    if not asked.model.is_dir():
        print(f"no model at {asked.model}: nothing measured", file=sys.stderr)
        return
    asked.out.mkdir(parents=True, exist_ok=True)
    stores = _stores(asked)
    path = asked.out / "curves.jsonl"
    settings = {"batch": asked.batch, "calibration": asked.calibration, "measured": asked.measured}
    curves = _known(path, settings)
    for seed in asked.seeds:
        for way in WAYS:
            if not any(c["way"] == way and c["seed"] == seed for c in curves):
                curve = _curve(asked, stores, way, seed) | {"settings": settings}
                with path.open("a") as f:
                    f.write(json.dumps(curve) + "\n")
                curves.append(curve)
    chosen = [c for c in curves if c["seed"] in asked.seeds]
    told = {text: _summary(chosen, text, asked.seeds) for text in MEASURED}
    print(json.dumps({"settings": settings, "points": POINTS, "curves": chosen} | told, indent=1))


def _known(path: Path, settings: dict[str, int]) -> list[Curve]:
    lines = path.read_text().splitlines() if path.is_file() else []
    return [c for c in map(json.loads, lines) if c["settings"] == settings]


def _stores(asked: argparse.Namespace) -> dict[str, TokenStore]:
    """Tokens of every text, and of both training texts as one."""
    tokenizer = load_tokenizer(asked.model)
    files = {p.stem: p for p in asked.texts.iterdir() if p.is_file()}
    texts_of = {name: (name,) for name in (*CALIBRATION, *MEASURED)} | {"train": CALIBRATION}
    stores = {}
    for name, texts in texts_of.items():
        documents = (d for text in texts for d in read_documents(TextSource(path=str(files[text]))))
        stores[name] = build_token_store(
            documents, tokenizer, asked.out / f"tokens-{name}",
            eos_token_id=tokenizer.eos_token_id, max_tokens=None,
        )  # fmt: skip
    return stores


def _curve(asked: argparse.Namespace, stores: dict[str, TokenStore], way: str, seed: int) -> Curve:
    """Cut one student and train it; its losses on both test texts at every point."""
    began = time.process_time()
    texts = {
        name: torch.stack([stores[name].window(k, SEQ_LEN) for k in range(asked.measured)])
        for name in MEASURED
    }
    curve: Curve = {"way": way, "seed": seed} | {name: [] for name in MEASURED}
    with tempfile.TemporaryDirectory() as place:
        student = Path(place) / "student"
        student.mkdir()
        _write_student(asked, stores, way, seed, student)
        trainer = _trainer(asked, stores["train"], student, seed)
        for point in POINTS:
            while trainer.step < point:
                trainer.train_step()
            for name, windows in texts.items():
                nats = sum(summed_loss(trainer.objective.student, ids) for ids in windows.split(10))
                curve[name].append(nats / (len(windows) * (SEQ_LEN - 1)))
            shown = ", ".join(f"{curve[name][-1]:.3f}" for name in MEASURED)
            print(f"{way} {seed}: step {point}: {shown}", file=sys.stderr, flush=True)
    return curve | {"cpu_seconds": round(time.process_time() - began)}


def _write_student(
    asked: argparse.Namespace, stores: dict[str, TokenStore], way: str, seed: int, out: Path
) -> None:
    checkpoint = Checkpoint.open(asked.model)
    have = sizes(checkpoint.family, checkpoint.config)
    wanted = have | {"hidden": have["hidden"] * 3 // 4, "ffn": have["ffn"] * 5 // 8}
    drawn = torch.cat(
        [sample_windows(stores[n], asked.calibration, SEQ_LEN, seed) for n in CALIBRATION]
    )
    scores = score_windows(checkpoint, list(drawn), score=Score(micro_batch=SCORED_AT_ONCE))
    settings = WAYS[way]
    decision = decide(
        checkpoint.family, checkpoint.config, sizes=have, new=wanted, settings=settings
    )
    student = Student.of(
        checkpoint, choose(scores, sizes=wanted, score=Score()), sizes=wanted,
        prune=Prune(dtype="float32"), decision=decision, ridge=settings.ridge, seed=seed,
    )  # fmt: skip
    batches = tuple(batches_of(list(drawn), SCORED_AT_ONCE))
    student.write(out, Samples(batches, batches[:1]))


def _trainer(asked: argparse.Namespace, train: TokenStore, student: Path, seed: int) -> Trainer:
    model = load_model(student)
    settings = Distill(
        tokens=POINTS[-1] * asked.batch * SEQ_LEN, lr=1e-3, min_lr=1e-5, warmup_steps=10,
        global_batch=asked.batch, micro_batch=8, dtype="float32",
    )  # fmt: skip
    world = World(0, 1, torch.device("cpu"))
    return Trainer(
        objective=Objective(model),
        teacher=Teacher(load_model(asked.model, dtype=torch.float32)),
        alpha="dynamic",
        train_windows=Windows(train, SEQ_LEN, model.config.vocab_size),
        validation_windows=None,
        settings=settings,
        seed=seed,
        world=world,
        state=StateFolder(student.with_name("state"), {}, world, _silent),
        stop=StopRequest(),
        on_event=_silent,
    )


def _silent(kind: str, fields: object) -> None:
    """Nobody watches."""


def _summary(curves: Sequence[Curve], text: str, seeds: Sequence[int]) -> dict[str, Any]:
    """Means and spreads over seeds, the gap of pairs after all steps, and steps to equal loss."""
    of = {way: {c["seed"]: c[text] for c in curves if c["way"] == way} for way in WAYS}
    told: dict[str, Any] = {}
    for way, found in of.items():
        columns = list(zip(*found.values(), strict=True))
        told[way] = {
            "mean": [statistics.mean(c) for c in columns],
            "spread": [max(c) - min(c) for c in columns],
        }
    sixty = POINTS.index(60)
    pairs = [(of["plain"][seed], of["compensated"][seed]) for seed in seeds]
    told["plain_above_compensated_at_the_end"] = [p[-1] - c[-1] for p, c in pairs]
    for way, target in (("compensated", 1), ("plain", 0)):
        told[f"steps_to_the_60_step_loss_of_{way}"] = {
            "plain": [_steps_to(pair[target][sixty], pair[0]) for pair in pairs],
            "compensated": [_steps_to(pair[target][sixty], pair[1]) for pair in pairs],
        }
    return told


def _steps_to(loss: float, curve: Sequence[float]) -> float | None:
    """The step at which a curve first comes down to a loss; None if it never does.

    Between measured points the loss is taken as linear in log(1 + step).
    """
    if curve[0] <= loss:
        return 0.0
    for k in range(1, len(POINTS)):
        if curve[k] <= loss:
            share = (curve[k - 1] - loss) / (curve[k - 1] - curve[k])
            low, high = math.log1p(POINTS[k - 1]), math.log1p(POINTS[k])
            return round(math.expm1(low + share * (high - low)), 1)
    return None


if __name__ == "__main__":
    main()
