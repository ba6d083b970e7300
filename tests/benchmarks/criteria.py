"""Loss right after pruning by every criterion, trimmed and compensated: needs a model and texts.

python tests/benchmarks/criteria.py --model MODEL --texts FOLDER --out RESULTS.jsonl

FOLDER holds gsm8k-train.jsonl, speeches.jsonl, gsm8k-test.jsonl and wikitext2-test.txt; without
MODEL there is nothing to measure. A seed draws the calibration windows, 256 tokens each and as many
of each of two texts; `random` draws by it too. Every result is appended to RESULTS.jsonl as it
comes; run again to go on. Printed is one JSON object: mean, lowest and highest loss of the seeds,
in nats a token, on the first windows of each of two other texts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
from paretron.evaluate.perplexity import summed_loss
from paretron.families import sizes
from paretron.importance.collect import batches_of
from paretron.importance.criteria import CRITERIA, Material
from paretron.importance.depth import Evaluator, greedy_removal
from paretron.importance.executor import LayerStack
from paretron.importance.measures import LossMeasure
from paretron.importance.score import score_windows
from paretron.importance.scores import Scores
from paretron.recipe import Compensate, Prune, Score, TextSource
from paretron.surgery.prune import write_pruned
from paretron.surgery.selection import Selection, choose

SEQ_LEN, BATCH = 256, 16
CALIBRATION = ("gsm8k-train.jsonl", "speeches.jsonl")
MEASURED = ("gsm8k-test.jsonl", "wikitext2-test.txt")
WAYS = {"trimmed": Compensate(rotate=False, refit=False), "compensated": Compensate()}
RANKED_BY = ("random", "magnitude", "taylor", "fluctuation", "activation")
# Shares of an axis that stay; heads go inside their KV groups, or with them.
WIDTHS = {
    "ffn": (0.75, 0.5), "q_per_kv": (0.5,), "kv_heads": (2 / 3,), "hidden": (0.75, 0.5),
}  # fmt: skip
# Name -> depth, and whether what is removed is merged into the layer before it.
DEPTHS: dict[str, tuple[dict[str, Any], bool]] = {
    "random": ({"metric": "random", "contiguous": False}, False),
    "magnitude (Shortened LLaMA)": ({"metric": "magnitude", "contiguous": False}, False),
    "taylor (Shortened LLaMA)": ({"metric": "taylor", "contiguous": False}, False),
    "bi one by one (ShortGPT)": ({"metric": "bi", "contiguous": False}, False),
    "bi of the block": ({"metric": "bi"}, False),
    "angular of the block": ({"metric": "angular"}, False),
    "loss one by one (Shortened LLaMA)": ({"metric": "loss", "contiguous": False}, False),
    "loss of the block": ({"metric": "loss"}, False),
    "loss of the block, merged (LaCo)": ({"metric": "loss"}, True),
}
DEPTH_SHARES = (0.75, 0.5)


@dataclass(frozen=True)
class Case:
    """One student: what it is ranked by, its sizes, and how it is made."""

    axis: str
    share: float
    ranked_by: str
    way: str
    seed: int
    score: Score
    prune: Prune

    @property
    def key(self) -> list[Any]:
        """What its result is known by."""
        return [self.axis, round(self.share, 3), self.ranked_by, self.way, self.seed]


def cases(seeds: int) -> Iterator[Case]:
    """Every student; trimming first, which is the cheaper half."""
    plain = Prune(merge_heads=False, dtype="float32")
    for way in WAYS:
        for seed in range(seeds):
            for criterion in RANKED_BY:
                score = Score.model_validate({"criterion": criterion})
                for axis, shares in WIDTHS.items():
                    for share in shares:
                        yield Case(axis, share, criterion, way, seed, score, plain)
            for name, (depth, merged) in DEPTHS.items():
                score = Score.model_validate({"depth": depth})
                prune = plain.model_copy(update={"layers": "merge"}) if merged else plain
                for share in DEPTH_SHARES:
                    yield Case("layers", share, name, way, seed, score, prune)


class Bench:
    """The teacher, its texts, and what was already computed."""

    def __init__(self, asked: argparse.Namespace, folder: Path) -> None:
        self.model: Path = asked.model
        self.checkpoint = Checkpoint.open(asked.model)
        self.have = sizes(self.checkpoint.family, self.checkpoint.config)
        self._calibration: int = asked.calibration
        self._stores = {n: self._store(asked.texts / n, folder / n) for n in CALIBRATION + MEASURED}
        self._texts = {
            n: torch.stack([self._stores[n].window(k, SEQ_LEN) for k in range(asked.measured)])
            for n in MEASURED
        }
        self._scores: tuple[int, dict[str, Scores]] | None = None  # of one seed
        self._losses: dict[str, dict[str, float]] = {}  # of students that are the very same

    def teacher(self) -> dict[str, float]:
        """The loss of the model itself."""
        return self._measured(self.model)

    def loss(self, case: Case) -> dict[str, float]:
        """Make one student and measure it."""
        windows = self._windows(case.seed)
        if self._scores is None or self._scores[0] != case.seed:
            self._scores = (case.seed, self._scored(windows, case.seed))
        scores = self._scores[1][case.score.criterion]
        new = self.have | {case.axis: round(case.share * self.have[case.axis])}
        selection = choose(scores, sizes=new, score=case.score)
        same = _digest(selection, case)
        if same not in self._losses:
            self._losses[same] = self._made(case, selection, new, windows)
        return self._losses[same]

    def _scored(self, windows: list[torch.Tensor], seed: int) -> dict[str, Scores]:
        """Scores by every criterion, complete for every depth, from one pass of each kind."""
        lost = [self.have["layers"] - round(s * self.have["layers"]) for s in DEPTH_SHARES]
        settings = Score(micro_batch=BATCH)
        base = score_windows(
            self.checkpoint, windows, score=settings, block_sizes=lost, seed=seed
        )  # fmt: skip
        stack = LayerStack(load_model(self.model), self.checkpoint.family)
        batches = list(batches_of(windows, BATCH))
        material = Material(self.checkpoint, stack, batches, seed=seed)
        found = {name: criterion(material) for name, criterion in CRITERIA.items()}
        judged = LossMeasure(list(batches_of(windows[: settings.depth.samples], BATCH)))
        order = greedy_removal(Evaluator(stack, judged), rounds=max(lost))
        losses = base.info.losses
        values = {n: f.layers.tolist() for n, f in found.items() if f.layers is not None}
        info = base.info.model_copy(
            update={
                "losses": losses and losses.model_copy(update={"greedy": order}),
                "layer_values": values,
            }
        )
        by_name = {
            name: Scores(info.model_copy(update={"criterion": name}), base.statistics, f.units)
            for name, f in found.items()
        }
        return by_name | {"activation": Scores(info, base.statistics)}

    def _made(
        self,
        case: Case,
        selection: Selection,
        new: Mapping[str, int],
        windows: list[torch.Tensor],
    ) -> dict[str, float]:
        settings = WAYS[case.way]
        decision = decide(
            self.checkpoint.family, self.checkpoint.config, sizes=self.have, new=new,
            settings=settings,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as place:
            out = Path(place) / "student"
            out.mkdir()
            if decision.any:
                batches = tuple(batches_of(windows, BATCH))
                Student.of(
                    self.checkpoint, selection, sizes=new, prune=case.prune, decision=decision,
                    ridge=settings.ridge, seed=case.seed,
                ).write(out, Samples(batches, batches[:1]))  # fmt: skip
            else:
                write_pruned(self.checkpoint, selection, out, sizes=new, prune=case.prune)
            return self._measured(out)

    def _windows(self, seed: int) -> list[torch.Tensor]:
        drawn = (sample_windows(self._stores[n], self._calibration, SEQ_LEN, seed)
                 for n in CALIBRATION)  # fmt: skip
        return list(torch.cat(list(drawn)))

    def _measured(self, folder: Path) -> dict[str, float]:
        model = load_model(folder)
        return {
            name: sum(summed_loss(model, ids) for ids in windows.split(20))
            / (len(windows) * (SEQ_LEN - 1))
            for name, windows in self._texts.items()
        }

    def _store(self, text: Path, folder: Path) -> TokenStore:
        tokenizer = load_tokenizer(self.model)
        build_token_store(
            read_documents(TextSource(path=str(text))), tokenizer, folder,
            eos_token_id=tokenizer.eos_token_id, max_tokens=None,
        )  # fmt: skip
        return TokenStore.open(folder)


def _digest(selection: Selection, case: Case) -> str:
    """What a student depends on: what stays and how it is made; compensation on the samples too."""
    hashed = hashlib.sha256(repr((selection.layers, case.prune, case.way)).encode())
    if case.way != "trimmed":
        hashed.update(str(case.seed).encode())
    if case.axis == "hidden" and case.way != "trimmed":
        return hashed.hexdigest() + str(case.share)  # rotated: no channel is chosen
    for kept in (selection.shared, *selection.units.values()):
        for axis, numbers in sorted(kept.items()):
            hashed.update(axis.encode() + numbers.numpy().tobytes())
    return hashed.hexdigest()


def summary(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean, lowest and highest over the seeds of every row."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        rows.setdefault(json.dumps(result["key"][:4]), []).append(result["loss"])
    return [
        dict(zip(("axis", "share", "ranked_by", "way"), json.loads(key), strict=True))
        | {"seeds": len(losses)}
        | {
            text: {
                "mean": round(statistics.mean(x[text] for x in losses), 4),
                "lowest": round(min(x[text] for x in losses), 4),
                "highest": round(max(x[text] for x in losses), 4),
            }
            for text in MEASURED
        }
        for key, losses in rows.items()
    ]


def main() -> None:
    """Measure what is not in the results yet, and print the summary of all."""
    parser = argparse.ArgumentParser()
    for name in ("model", "texts", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--calibration", type=int, default=128, help="windows of each of two texts")
    parser.add_argument("--measured", type=int, default=200, help="windows of each test text")
    asked = parser.parse_args()
    if not asked.model.is_dir():
        print(f"no model at {asked.model}: nothing measured", file=sys.stderr)
        return
    settings = {"calibration": asked.calibration, "measured": asked.measured}
    lines = asked.out.read_text().splitlines(keepends=True) if asked.out.exists() else []
    known = [json.loads(line) for line in lines if line.endswith("\n")]
    known = [result for result in known if result["settings"] == settings]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, asked.out.open("a") as file:
        bench = Bench(asked, Path(folder))
        if lines and not lines[-1].endswith("\n"):
            file.write("\n")  # what a killed run left half written
        teacher = bench.teacher()
        for case in cases(asked.seeds):
            if any(result["key"] == case.key for result in known):
                continue
            start = time.perf_counter()
            loss = bench.loss(case)
            seconds = round(time.perf_counter() - start, 1)
            result = {"key": case.key, "loss": loss, "settings": settings, "seconds": seconds}
            file.write(json.dumps(result) + "\n")
            file.flush()
            known.append(result)
    print(json.dumps({"settings": settings, "teacher": teacher, "rows": summary(known)}))


if __name__ == "__main__":
    main()
