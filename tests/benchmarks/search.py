"""A searched student against a hand-picked one at equal budget and equal distillation, as JSON.

python tests/benchmarks/search.py --model MODEL --texts FOLDER --out RUNS --budget params

FOLDER holds gsm8k-train.jsonl, gsm8k-test.jsonl, speeches.jsonl and wikitext2-test.txt; without
MODEL there is nothing to measure. The hand-picked student has three quarters of the hidden size and
five eighths of the MLP; the budget is what it costs, in parameters or in predicted time. Operators
and, in the end, both students are timed by the processor time of one thread, so that other programs
matter little. The search sees no test text: it selects on the last 300 problems of the training
text, which are left out of training.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from paretron.artifacts.manifest import Provenance
from paretron.artifacts.models import load_model
from paretron.artifacts.reader import Checkpoint
from paretron.cli.search import upstream
from paretron.evaluate.stage import evaluate_model
from paretron.families import Sizes, parameter_counts, sizes
from paretron.families.table import with_sizes
from paretron.plan.plan import make_plan
from paretron.recipe import Evaluate, Recipe, Space, Speed, TokenisedSource, load_recipe
from paretron.run.runner import run_plan
from paretron.run.stages import STAGES
from paretron.run.texts import build_store
from paretron.run.workspace import Workspace
from paretron.search.space import Shapes, shapes_of
from paretron.search.stage import SEARCH
from paretron.search.table import OperatorTable, predicted_ms
from paretron.search.timing import LayerTimer, grid_points

HELD_OUT = 300  # problems of the training text that the search selects on
SEQ_LEN = 128
SPEED = Speed(ms=1.0, batch=4, lengths=(128, 32), repeats=7)


def main() -> None:
    """Print one JSON object: both students' shapes, costs and losses on both test texts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", choices=("params", "speed"), required=True)
    parser.add_argument("--rounds", type=int, nargs="*", default=(15, 30), help="steps")
    parser.add_argument("--steps", type=int, default=60, help="of the final distillation")
    parser.add_argument("--keep", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8, help="windows a step")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if not asked.model.is_dir():
        print(f"no model at {asked.model}: nothing measured", file=sys.stderr)
        return
    asked.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    began = time.perf_counter()
    checkpoint = Checkpoint.open(asked.model)
    have = sizes(checkpoint.family, checkpoint.config)
    hand = {"hidden": have["hidden"] * 3 // 4, "ffn": have["ffn"] * 5 // 8}
    space = _space(have)
    table = _table(checkpoint, space, asked.out / "table.json")
    recipe = _recipe(asked, checkpoint, hand, space, table)
    plan = make_plan(recipe, out=asked.out, offline=True)
    stages = upstream(plan.stages, {"searched.distill", "hand.distill"})
    run_plan(dataclasses.replace(plan, stages=stages), asked.out, stages=STAGES)
    place = Workspace(asked.out.absolute())
    found = json.loads((place.artifact("searched.search") / SEARCH).read_text())
    result: dict[str, Any] = {"budget": asked.budget, "seed": asked.seed}
    result |= {"shapes": found["shapes"], "candidates": len(found["candidates"])}
    result["bounds"] = found["bounds"]
    for name in ("searched", "hand"):
        model = Checkpoint.open(place.artifact(f"{name}.distill"))
        size = sizes(model.family, model.config)
        result[name] = {
            "sizes": size,
            "params": parameter_counts(model.family, model.config).total,
            "ms": _predicted(table, size),
            "when_pruned": _losses(place.artifact(f"{name}.prune"), asked, name),
            "after": _losses(place.artifact(f"{name}.distill"), asked, name),
        }
    result["measured_time_searched_over_hand"] = _time_ratios(
        place.artifact("searched.distill"), place.artifact("hand.distill"), pairs=15
    )
    shown = ("words", "loss", "rounds")
    trained = (row for row in found["candidates"] if row["rounds"])
    result["trained"] = [{k: row[k] for k in shown} for row in trained]
    print(json.dumps(result | {"seconds": round(time.perf_counter() - began)}, indent=1))


def _space(have: Sizes) -> dict[str, Any]:
    kv_heads, group = have["kv_heads"], have["q_per_kv"]
    return {
        "layers": {"from": have["layers"] // 2, "to": have["layers"]},
        "hidden": {"from": have["hidden"] // 2, "to": have["hidden"], "multiple": 16},
        "ffn": {"from": have["ffn"] // 4, "to": have["ffn"], "multiple": 32},
        "heads": [kv_heads, kv_heads * group],
    }


def _table(checkpoint: Checkpoint, space: dict[str, Any], path: Path) -> OperatorTable:
    """The operator table of the space, measured once."""
    if not path.is_file():
        timer = LayerTimer(
            checkpoint.family, checkpoint.config, "float32", SPEED, clock=time.process_time
        )
        have = sizes(checkpoint.family, checkpoint.config)
        timer.table(grid_points(shapes_of(Space.model_validate(space), have))).save(path)
    return OperatorTable.load(path)


def _predicted(table: OperatorTable, size: Sizes) -> float:
    import numpy as np

    one = Shapes({axis: np.array([n]) for axis, n in size.items()})
    return float(predicted_ms(table, one, SPEED)[0])


def _recipe(
    asked: argparse.Namespace,
    checkpoint: Checkpoint,
    hand: dict[str, int],
    space: dict[str, Any],
    table: OperatorTable,
) -> Recipe:
    lines = (asked.texts / "gsm8k-train.jsonl").read_text("utf-8").strip().split("\n")
    speeches = (asked.texts / "speeches.jsonl").read_text("utf-8").strip().split("\n")
    train = "\n".join([*lines[:-HELD_OUT], *speeches])
    texts = {"train": train, "validation": "\n".join(lines[-HELD_OUT:])}
    for name, text in texts.items():
        (asked.out / f"{name}.jsonl").write_text(text + "\n", "utf-8")
    have = sizes(checkpoint.family, checkpoint.config)
    size = {**have, **hand}
    if asked.budget == "params":
        config = with_sizes(
            checkpoint.family, checkpoint.config, size, kept_layers=tuple(range(size["layers"]))
        )
        budget: dict[str, Any] = {"params": parameter_counts(checkpoint.family, config).total}
    else:
        speed = SPEED.model_dump() | {"ms": _predicted(table, size), "table": "table.json"}
        budget = {"speed": speed}
    step = asked.batch * SEQ_LEN
    source = {"seq_len": SEQ_LEN}
    search = {
        "space": space, "budget": budget, "samples": 32, "keep": asked.keep,
        "rounds": [n * step for n in asked.rounds],
    }  # fmt: skip
    recipe = {
        "schema": 1,
        "teacher": {"model": str(asked.model.absolute())},
        "data": {
            "calibration": source | {"path": "train.jsonl", "samples": 128},
            "train": source | {"path": "train.jsonl", "tokens": 2_000_000},
            "validation": source | {"path": "validation.jsonl", "tokens": 128 * SEQ_LEN},
        },
        "score": {"depth": {"samples": 32}},
        "prune": {"dtype": "float32"},
        "students": {"searched": {"search": search}, "hand": hand},
        "distill": {
            "tokens": asked.steps * step, "lr": 1e-3, "min_lr": 1e-5, "warmup_steps": 10,
            "global_batch": asked.batch, "micro_batch": asked.batch, "dtype": "float32",
            "eval_every": asked.steps, "checkpoint_every": asked.steps,
        },
        "seed": asked.seed,
    }  # fmt: skip
    path = asked.out / "recipe.yaml"
    path.write_text(json.dumps(recipe, indent=1))
    return load_recipe(path)


def _time_ratios(searched: Path, hand: Path, *, pairs: int) -> dict[str, float]:
    """The searched model's processor time over the other's, a batch of requests each in turn."""
    models = [load_model(folder) for folder in (searched, hand)]
    tokens_in, tokens_out = SPEED.lengths
    ids = torch.randint(3, 1000, (SPEED.batch, tokens_in), generator=torch.manual_seed(0))
    ratios = []
    for pair in range(pairs + 1):
        seconds = {}
        for k in (0, 1) if pair % 2 else (1, 0):
            began = time.process_time()
            models[k].generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False,
                min_new_tokens=tokens_out, max_new_tokens=tokens_out, pad_token_id=0,
            )  # fmt: skip
            seconds[k] = time.process_time() - began
        ratios.append(seconds[0] / seconds[1])
    low, middle, high = statistics.quantiles(ratios[1:], n=4)  # the first pair warms up
    return {"median": middle, "lower_quartile": low, "upper_quartile": high, "pairs": pairs}


def _losses(model: Path, asked: argparse.Namespace, name: str) -> dict[str, float]:
    """Mean loss in nats on 200 windows of each test text."""
    stores: dict[str, tuple[Path, int]] = {}
    for text in ("gsm8k-test.jsonl", "wikitext2-test.txt"):
        store = asked.out / f"tokens-{Path(text).stem}"
        if not store.is_dir():
            source = TokenisedSource(path=str(asked.texts / text))
            limit = 200 * SEQ_LEN
            build_store(source, store, tokenizer=asked.model, max_tokens=limit, offline=True)
        stores[Path(text).stem] = (store, SEQ_LEN)
    found = evaluate_model(
        model,
        stores,
        settings=Evaluate(),
        out=asked.out / f"losses-{name}",
        provenance=Provenance(kind="evaluation"),
        overwrite=True,
        on_event=lambda kind, fields: None,
    )
    return {text: loss.loss for text, loss in found.texts.items()}


if __name__ == "__main__":
    main()
