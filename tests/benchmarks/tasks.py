"""Accuracy on minimal pairs through lm-eval against a direct computation, and after a kill.

python tests/benchmarks/tasks.py --model MODEL --pairs FOLDER

FOLDER holds a .jsonl file for each phenomenon, as BLiMP has them: `sentence_good` and
`sentence_bad` on every line. Each becomes a task of its own, in which the right sentence stands
second in every other document. The command line asks them all, is killed once half of them are
done, and is run again. Printed is one JSON object: by phenomenon the accuracy, its interval and
that of a direct computation (every sentence alone, nothing padded, nothing of lm-eval), and which
tasks the second run asked.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from paretron.artifacts.manifest import versions
from paretron.artifacts.models import load_model, load_tokenizer

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: ""
target_delimiter: ""
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def write_tasks(pairs: Path, folder: Path) -> list[Path]:
    """A task for every file of pairs."""
    made = []
    for file in sorted(pairs.glob("*.jsonl")):
        documents = []
        for k, line in enumerate(file.read_text("utf-8").splitlines()):
            pair = json.loads(line)
            choices = [pair["sentence_good"], pair["sentence_bad"]]
            gold = k % 2
            documents.append({"choices": choices[::-1] if gold else choices, "gold": gold})
        lines = "\n".join(map(json.dumps, documents))
        (folder / f"{file.stem}.jsonl").write_text(lines + "\n")
        made.append(folder / f"{file.stem}.yaml")
        made[-1].write_text(TASK.format(name=file.stem))
    return made


def directly(model: Path, documents: Path, *, dtype: torch.dtype) -> list[float]:
    """Whether the right sentence of each document is the likelier one."""
    network, tokenizer = load_model(model, dtype=dtype), load_tokenizer(model)
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    scores = []
    for line in documents.read_text().splitlines():
        document = json.loads(line)
        sums = []
        for choice in document["choices"]:
            ids = torch.tensor([[begin, *tokenizer.encode(choice, add_special_tokens=False)]])
            with torch.inference_mode():
                logs = network(ids).logits.log_softmax(-1)[0, :-1]
            sums.append(float(logs.gather(1, ids[0, 1:, None]).sum(dtype=torch.float64)))
        scores.append(float(sums.index(max(sums)) == document["gold"]))
    return scores


def done_in(journal: Path) -> int:
    """The number of tasks that a journal holds whole."""
    return journal.read_bytes().count(b'"key": ["task"') if journal.is_file() else 0


def evaluate_killed_once(model: Path, tasks: list[Path], out: Path) -> dict[str, Any]:
    """Ask the tasks by the command line, killed half-way; what the second run said and took."""
    asked = [
        sys.executable, "-m", "paretron", "eval", str(model), "--tasks",
        ",".join(map(str, tasks)), "--out", str(out), "--offline",
    ]  # fmt: skip
    journal = out.parent / f".{out.name}.state/tasks.jsonl"
    process = subprocess.Popen(asked, start_new_session=True)
    while done_in(journal) < len(tasks) // 2:
        if process.poll() is not None:
            raise SystemExit(f"the evaluation ended by itself: {process.returncode}")
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept, start = done_in(journal), time.perf_counter()
    again = subprocess.run(asked, check=True, stderr=subprocess.PIPE, text=True)
    told = re.findall(r"^eval: (\S+) acc [\d.]+(, from before)?$", again.stderr, re.MULTILINE)
    return {
        "kept": kept,
        "reused": [name for name, before in told if before],
        "asked_again": [name for name, before in told if not before],
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    """Print one JSON object."""
    options = argparse.ArgumentParser()
    options.add_argument("--model", type=Path, required=True)
    options.add_argument("--pairs", type=Path, required=True)
    asked = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="paretron-") as name:
        folder = Path(name)
        tasks = write_tasks(asked.pairs, folder)
        killed = evaluate_killed_once(asked.model, tasks, folder / "out")
        scores = json.loads((folder / "out/evaluation.json").read_text())["tasks"]
        found, differing = {}, 0
        for task in tasks:
            direct = directly(asked.model, task.with_suffix(".jsonl"), dtype=torch.float32)
            samples = (folder / f"out/samples/{task.stem}.jsonl").read_text().splitlines()
            own = [json.loads(line)["score"] for line in samples]
            differing += sum(a != b for a, b in zip(own, direct, strict=True))
            score = scores[task.stem]
            found[task.stem] = {
                "accuracy": score["value"], "low": score["low"], "high": score["high"],
                "documents": score["samples"],
                "off_direct": abs(score["value"] - sum(direct) / len(direct)),
            }  # fmt: skip
    accuracies = [row["accuracy"] for row in found.values()]
    report = {
        "model": asked.model.name,
        "chance": 0.5,
        "mean_accuracy": sum(accuracies) / len(accuracies),
        "above_chance": sum(row["low"] > 0.5 for row in found.values()),
        "largest_off_direct": max(row["off_direct"] for row in found.values()),
        "documents_judged_otherwise": differing,
        "phenomena": found,
        "killed": killed,
        "versions": versions(),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
