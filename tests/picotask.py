"""A task that a pico model can learn: does the verb agree with its noun, for pairs never read."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from picorun import teach

NOUNS = ("dog", "cat", "bird", "farmer", "sailor", "child", "horse", "baker", "queen", "fox",
         "singer", "guest")  # fmt: skip
VERBS = ("run", "sing", "wait", "jump", "sleep", "walk", "read", "dance", "swim", "dream", "rest",
         "play")  # fmt: skip
PLURALS = {"child": "children", "fox": "foxes"}
TASK = Path(__file__).parent / "evaluate/data/agreement.yaml"


def sentences(*, held_out: bool) -> Iterator[tuple[str, str]]:
    """Pairs of a sentence that is right and one that is wrong, of the kept or the other pairs."""
    for i, noun in enumerate(NOUNS):
        for j, verb in enumerate(VERBS):
            if ((i + j) % 4 == 0) == held_out:
                plural = PLURALS.get(noun, f"{noun}s")
                yield f"the {noun} {verb}s here.", f"the {noun} {verb} here."
                yield f"the {plural} {verb} here.", f"the {plural} {verb}s here."


def training_text(*, seed: int = 0) -> str:
    """The sentences that are right and not held out, many times over."""
    drawn = random.Random(seed).choices([good for good, _ in sentences(held_out=False)], k=1500)
    return "\n".join(drawn) + "\n"


def learn(model: Path, *, steps: int = 50) -> Path:
    """Train a pico model on the task's language, and save it in place."""
    teach(model, training_text(), steps=steps, seq_len=32)
    return model


def documents() -> Iterator[str]:
    """The lines of the task's file; which choice is right is drawn, so that ties are no help."""
    generator = random.Random(1)
    for good, bad in sentences(held_out=True):
        gold = generator.randrange(2)
        choices = [bad, good] if gold else [good, bad]
        yield json.dumps({"choices": choices, "gold": gold})


def write_task(folder: Path, name: str, lines: list[str], **changes: str) -> Path:
    """A task of one's own in a folder: its documents, and a file that says how they are asked."""
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    said = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": f"{{data_files: {{test: {name}.jsonl}}}}",
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": '""',
        "target_delimiter": '""',
        "doc_to_choice": '"{{choices}}"',
        "doc_to_target": "gold",
        "metric_list": "[{metric: acc, aggregation: mean, higher_is_better: true}]",
    } | changes
    path = folder / f"{name}.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in said.items()))
    return path
