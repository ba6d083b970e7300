"""Distillation against retraining on labels, and with and without correction, as JSON lines.

python tests/benchmarks/correction.py --model DIR --texts FOLDER --work DIR --out RESULTS.jsonl

FOLDER holds gsm8k-train.jsonl, gsm8k-test.jsonl, speeches.jsonl, wikitext2-valid.txt and
wikitext2-test.txt. A width student of 60 % of the parameters of a hidden-192 teacher is pruned once
a seed and text, then trained in several ways. "own" text is what the teacher was trained on (GSM8K
train and speeches), "foreign" text it has never seen (WikiText-2 validation); both test texts are
unseen by everybody. Lines that RESULTS.jsonl holds already are not made again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from paretron.artifacts.manifest import MANIFEST, Provenance
from paretron.artifacts.models import load_model, load_tokenizer
from paretron.artifacts.reader import Checkpoint
from paretron.compensate.stage import prune_compensated
from paretron.data.sources import read_documents
from paretron.data.store import TokenStore
from paretron.data.tokens import build_token_store
from paretron.distill.stage import train
from paretron.evaluate.perplexity import summed_loss
from paretron.families import sizes
from paretron.importance.stage import score_model
from paretron.plan.cost import model_facts
from paretron.recipe import (
    Calibration,
    Compensate,
    Correct,
    Distill,
    Prune,
    Score,
    TextSource,
    Training,
)
from paretron.recipe.training import Loss

SEQ_LEN, BATCH, MEASURED = 256, 8, 200  # windows of SEQ_LEN tokens: a step's, a test's
STUDENT = {"hidden": 144, "ffn": 336}
TEXTS = {
    "own": ("gsm8k-train.jsonl", "speeches.jsonl"),
    "foreign": ("wikitext2-valid.txt",),
    "gsm8k-test": ("gsm8k-test.jsonl",),
    "wikitext-test": ("wikitext2-test.txt",),
}
TESTS = ("wikitext-test", "gsm8k-test")


@dataclass(frozen=True)
class Way:
    """One way to train a student; a `plain` one was trimmed and not compensated."""

    text: str
    loss: str
    corrected: bool = False
    equal_compute: bool = False
    plain: bool = False


WAYS = {
    "own: KL": Way("own", "kl"),
    "own: CE, equal tokens": Way("own", "ce"),
    "own: CE, equal compute": Way("own", "ce", equal_compute=True),
    "own: KL, teacher trained on": Way("own", "kl", corrected=True),
    "own, plain: KL": Way("own", "kl", plain=True),
    "own, plain: CE, equal tokens": Way("own", "ce", plain=True),
    "own, plain: CE, equal compute": Way("own", "ce", equal_compute=True, plain=True),
    "own, plain: KL, teacher trained on": Way("own", "kl", corrected=True, plain=True),
    "foreign: KL": Way("foreign", "kl"),
    "foreign: KL, teacher corrected": Way("foreign", "kl", corrected=True),
    "foreign: CE, equal tokens": Way("foreign", "ce"),
    "foreign: CE, equal compute": Way("foreign", "ce", equal_compute=True),
}


class Bench:
    """Teachers and pruned students, each made once and kept in the work folder."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked = asked
        self.stores = {name: self.store(name) for name in TEXTS}
        self.tests = {
            name: torch.stack(
                [TokenStore.open(self.stores[name]).window(k, SEQ_LEN) for k in range(MEASURED)]
            )
            for name in TESTS
        }

    def store(self, name: str) -> Path:
        """A text's tokens, documents separated."""
        folder: Path = self.asked.work / "texts" / name
        if not (folder / "done").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            tokenizer = load_tokenizer(self.asked.model)
            build_token_store(
                (text for file in TEXTS[name] for text in self.documents(file)), tokenizer, folder,
                eos_token_id=tokenizer.eos_token_id, max_tokens=None,
            )  # fmt: skip
            (folder / "done").touch()
        return folder

    def documents(self, file: str) -> Iterator[str]:
        return read_documents(TextSource(path=str(self.asked.texts / file)))

    def teacher(self, way: Way, seed: int) -> Path:
        """The model as given, or corrected on the text."""
        if not way.corrected:
            return Path(self.asked.model)
        out: Path = self.asked.work / f"teacher-{way.text}-{seed}"
        if not (out / MANIFEST).is_file():
            settings = Correct(**self.training(self.asked.steps, self.asked.correct_lr))
            self.train(self.asked.model, None, way.text, settings, seed, out)
        return out

    def pruned(self, way: Way, seed: int) -> Path:
        """The student before any training, calibrated on the text that it will learn."""
        teacher = self.teacher(way, seed)
        start = "trimmed" if way.plain else "pruned"
        out: Path = self.asked.work / f"{start}-{way.text}-{way.corrected}-{seed}"
        if (out / MANIFEST).is_file():
            return out
        scores = out.with_name(f"scores-{way.text}-{way.corrected}-{seed}")
        compensate = Compensate(rotate=False, refit=False) if way.plain else Compensate()
        store = self.stores[way.text]
        calibration = Calibration(path="unread.txt", seq_len=SEQ_LEN, samples=128)
        checkpoint = Checkpoint.open(teacher)
        if not (scores / MANIFEST).is_file():
            score_model(
                teacher, store, score=Score(), calibration_settings=calibration, block_sizes=(),
                seed=seed, out=scores, provenance=Provenance("scores"), on_event=silent,
            )  # fmt: skip
        prune_compensated(
            teacher, scores, store, sizes=sizes(checkpoint.family, checkpoint.config) | STUDENT,
            prune=Prune(dtype="float32"), score=Score(), compensate=compensate,
            calibration_settings=calibration, seed=seed, out=out, provenance=Provenance("prune"),
            on_event=silent,
        )  # fmt: skip
        return out

    def training(self, steps: int, lr: float) -> dict[str, Any]:
        return {
            "tokens": steps * BATCH * SEQ_LEN, "lr": lr, "min_lr": lr / 100, "warmup_steps": 10,
            "global_batch": BATCH, "micro_batch": BATCH, "dtype": "float32",
            "checkpoint_every": 10**6, "eval_every": 10**6,
        }  # fmt: skip

    def train(
        self, model: Path, teacher: Path | None, text: str, settings: Training, seed: int, out: Path
    ) -> None:
        state = out.with_name(f"{out.name}-state")
        train(
            model, self.stores[text], teacher=teacher, settings=settings, seq_len=SEQ_LEN,
            validation_tokens=None, validation_seq_len=SEQ_LEN, seed=seed, out=out, state=state,
            provenance=Provenance("train"), on_event=silent,
        )  # fmt: skip
        shutil.rmtree(state, ignore_errors=True)

    def result(self, way: Way, seed: int) -> dict[str, Any]:
        """Train a student and measure it."""
        teacher, student = self.teacher(way, seed), self.pruned(way, seed)
        steps = self.asked.steps
        own, other = (forward_flops(folder) for folder in (student, teacher))
        if way.equal_compute:  # what KL spends on the teacher's forward pass
            steps = round(steps * (3 * own + other) / (3 * own))
        loss = Loss(logits="none", labels=1.0) if way.loss == "ce" else Loss()
        out = self.asked.work / "trained"
        shutil.rmtree(out, ignore_errors=True)
        started = time.process_time()
        settings = Distill(**self.training(steps, self.asked.lr), loss=loss)
        self.train(student, teacher, way.text, settings, seed, out)
        seconds = time.process_time() - started
        return {
            "steps": steps,
            "cpu_seconds": round(seconds),
            "tflop": round(
                steps * BATCH * SEQ_LEN * (3 * own + (other if way.loss == "kl" else 0)) / 1e12, 2
            ),
            "teacher": self.losses(teacher),
            "pruned": self.losses(student),
            "trained": self.losses(out),
        }

    def losses(self, folder: Path) -> dict[str, float]:
        """Mean cross entropy of a checkpoint on every test text, nats a token."""
        model = load_model(folder)
        return {
            name: sum(summed_loss(model, ids) for ids in windows.split(10))
            / (len(windows) * (SEQ_LEN - 1))
            for name, windows in self.tests.items()
        }


def forward_flops(folder: Path) -> float:
    """FLOPs a token of one forward pass, by the planner's formula."""
    checkpoint = Checkpoint.open(folder)
    facts = model_facts(checkpoint.config, dtype=checkpoint.dtype)
    return facts.forward_flops(tokens=SEQ_LEN, seq_len=SEQ_LEN) / SEQ_LEN


def silent(kind: str, fields: Mapping[str, object]) -> None:
    """Nothing is shown while models train."""


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: the mean loss after training and its spread over seeds."""
    rows = ["| way | seeds | TFLOP | WikiText-2 test | GSM8K test |", "|---|---|---|---|---|"]
    for way in WAYS:
        found = [line for line in lines if line["way"] == way]
        if not found:
            continue
        cells = []
        for test in TESTS:
            values = [line["trained"][test] for line in found]
            spread = stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{mean(values):.3f} ± {spread:.3f}")
        rows.append(f"| {way} | {len(found)} | {found[0]['tflop']} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    """Append one JSON object a student to --out, then print a table of all."""
    parser = argparse.ArgumentParser()
    for name in ("model", "texts", "work", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--correct-lr", type=float, default=5e-4)
    parser.add_argument("--ways", nargs="*", default=list(WAYS), help="only these")
    asked = parser.parse_args()
    if not asked.model.is_dir() or not asked.texts.is_dir():
        parser.exit(0, "no model or no texts here: nothing measured\n")
    asked.work.mkdir(parents=True, exist_ok=True)
    lines = (
        [json.loads(x) for x in asked.out.read_text().splitlines()] if asked.out.exists() else []
    )
    bench = Bench(asked)
    for seed in range(asked.seeds):
        for name in asked.ways:
            if any((line["way"], line["seed"]) == (name, seed) for line in lines):
                continue
            settings = {"lr": asked.lr, "correct_lr": asked.correct_lr}
            line = {"way": name, "seed": seed} | asdict(WAYS[name]) | settings
            lines.append(line | bench.result(WAYS[name], seed))
            with asked.out.open("a") as file:
                print(json.dumps(lines[-1]), file=file, flush=True)
    print(table(lines))


if __name__ == "__main__":
    main()
