"""Loss right after pruning with and without compensation, as JSON lines: needs a model and texts.

python tests/benchmarks/compensate.py --model DIR --gsm8k-train F --speeches F --gsm8k-test F \
    --wikitext F --seeds 0 1 2

Calibrated on 128 windows of each of two texts, measured on the first 200 windows of each of two
others, 256 tokens a window; nothing is trained.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

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
from paretron.importance.score import score_windows
from paretron.importance.scores import Scores
from paretron.recipe import Compensate, Prune, Score, TextSource
from paretron.surgery.selection import Selection, choose

SEQ_LEN, BATCH = 256, 16
# Row -> (sizes, layers that go or None for those that the scores choose).
ROWS: dict[str, tuple[dict[str, int], tuple[int, ...] | None]] = {
    "hidden 192 to 144": ({"hidden": 144}, None),
    "hidden 192 to 96": ({"hidden": 96}, None),
    "MLP 512 to 384": ({"ffn": 384}, None),
    "MLP 512 to 256": ({"ffn": 256}, None),
    "layers 8 to 6 (1, 2 removed)": ({"layers": 6}, (1, 2)),
    "layers 8 to 4 (1 to 4 removed)": ({"layers": 4}, (1, 2, 3, 4)),
    "hidden 144 and MLP 320": ({"hidden": 144, "ffn": 320}, None),
    "query heads 6 to 3": ({"q_per_kv": 1}, None),
}
PLAIN: dict[str, object] = {"rotate": False, "refit": False}
WAYS: dict[str, dict[str, object]] = {
    "plain": PLAIN,
    "plain, heads merged": PLAIN | {"merge": True},
    "rotation alone": {"rotate": "auto", "refit": False},
    "compensated": {},
    "compensated, heads merged": {"merge": True},
}


def ways_of(row: str) -> Iterator[str]:
    """The ways that differ for a row."""
    for way in WAYS:
        if way == "rotation alone" and "hidden" not in row:
            continue
        if "merged" in way and "heads" not in row:
            continue
        yield way


def windows_of(model: Path, text: Path, folder: Path) -> TokenStore:
    """A text's tokens, documents separated."""
    tokenizer = load_tokenizer(model)
    build_token_store(
        read_documents(TextSource(path=str(text))), tokenizer, folder,
        eos_token_id=tokenizer.eos_token_id, max_tokens=None,
    )  # fmt: skip
    return TokenStore.open(folder)


def without(selection: Selection, gone: tuple[int, ...] | None, total: int) -> Selection:
    """The selection with the layers that the row names."""
    if gone is None:
        return selection
    kept = tuple(i for i in range(total) if i not in gone)
    return Selection(kept, {}, {i: {} for i in kept}, {i: selection.head_ranks[i] for i in kept})


def measure(folder: Path, texts: dict[str, torch.Tensor]) -> dict[str, float]:
    """Mean loss of a checkpoint on every text, nats a token."""
    model = load_model(folder)
    return {
        name: sum(summed_loss(model, ids) for ids in windows.split(10))
        / (len(windows) * (SEQ_LEN - 1))
        for name, windows in texts.items()
    }


def student_loss(
    model: Path,
    scores: Scores,
    samples: Samples,
    row: str,
    way: str,
    texts: dict[str, torch.Tensor],
) -> dict[str, float]:
    """Make one student and measure it."""
    checkpoint = Checkpoint.open(model)
    have = sizes(checkpoint.family, checkpoint.config)
    new, gone = ROWS[row]
    wanted = have | new
    settings = dict(WAYS[way])
    prune = Prune(merge_heads=bool(settings.pop("merge", False)), dtype="float32")
    chosen = Compensate.model_validate(settings)
    decision = decide(checkpoint.family, checkpoint.config, sizes=have, new=wanted, settings=chosen)
    selection = choose(scores, sizes=wanted | {"layers": have["layers"]}, score=Score())
    student = Student.of(
        checkpoint, without(selection, gone, have["layers"]), sizes=wanted, prune=prune,
        decision=decision, ridge=chosen.ridge, seed=0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "student"
        out.mkdir()
        start = time.perf_counter()
        student.write(out, samples)
        seconds = time.perf_counter() - start
        return measure(out, texts) | {"seconds": round(seconds, 1)}


def main() -> None:
    """Print one JSON object a student: row, way, seed, losses."""
    parser = argparse.ArgumentParser()
    for name in ("model", "gsm8k-train", "speeches", "gsm8k-test", "wikitext"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--calibration", type=int, default=128, help="windows of each text")
    parser.add_argument("--measured", type=int, default=200, help="windows of each text")
    parser.add_argument("--rows", default="", help="only rows that contain this")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), help="only these")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        names = {"gsm8k-train": a.gsm8k_train, "speeches": a.speeches,
                 "gsm8k-test": a.gsm8k_test, "wikitext": a.wikitext}  # fmt: skip
        stores = {n: windows_of(a.model, p, Path(folder) / n) for n, p in names.items()}
        texts = {
            n: torch.stack([stores[n].window(k, SEQ_LEN) for k in range(a.measured)])
            for n in ("gsm8k-test", "wikitext")
        }
        print(json.dumps({"row": "teacher"} | measure(a.model, texts)), flush=True)
        for seed in a.seeds:
            drawn = torch.cat([
                sample_windows(stores[n], a.calibration, SEQ_LEN, seed)
                for n in ("gsm8k-train", "speeches")
            ])  # fmt: skip
            scores = score_windows(
                Checkpoint.open(a.model), list(drawn), score=Score(micro_batch=BATCH)
            )
            batches = tuple(batches_of(list(drawn), BATCH))
            samples = Samples(batches, batches[:1])
            for row in ROWS:
                if a.rows in row:
                    for way in (w for w in ways_of(row) if w in a.ways):
                        found = student_loss(a.model, scores, samples, row, way, texts)
                        print(
                            json.dumps({"row": row, "way": way, "seed": seed} | found), flush=True
                        )


if __name__ == "__main__":
    main()
