"""What a model is judged on, measured and published: evaluation.json and the values behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from paretron.artifacts.jsonfile import dump
from paretron.artifacts.manifest import Provenance
from paretron.artifacts.models import load_model, load_tokenizer
from paretron.artifacts.staging import staged
from paretron.data.taskfiles import asked_tasks
from paretron.errors import raise_all
from paretron.evaluate.asking import ModelAsker
from paretron.evaluate.endpoint import Endpoint
from paretron.evaluate.perplexity import (
    Loss,
    NetworkReader,
    OnEvent,
    Units,
    check_chunked_logits,
    measure_texts,
    open_texts,
)
from paretron.evaluate.served import ServedAsker
from paretron.evaluate.tasks import TaskScore, TaskScores, measure_tasks
from paretron.recipe import Evaluate

# {"texts": {name: loss}, "tasks": {name: score}, "left_out": {task: reason}}
EVALUATION = "evaluation.json"
WINDOWS = "windows.json"  # {"schema", "texts": {name: what every unit cost}}


@dataclass(frozen=True)
class Evaluation:
    """How good a model is on every text and in every task."""

    texts: Mapping[str, Loss]
    tasks: Mapping[str, TaskScore]


def evaluate_model(
    model: Path,
    stores: Mapping[str, tuple[Path, int]],
    *,
    settings: Evaluate,
    out: Path,
    provenance: Provenance,
    state: Path | None = None,
    offline: bool = False,
    overwrite: bool = False,
    on_event: OnEvent,
) -> Evaluation:
    """Measure a checkpoint and publish evaluation.json, with windows.json and samples/, at `out`.

    `stores` maps a text's name to its token store and seq_len. In float32, on the first GPU if
    there is one. In `state` lie the tasks that an evaluation of the same model got done before it
    was stopped. Errors: INPUT_CORPUS (nothing that can be predicted), GATE_NONFINITE,
    GATE_PREFLIGHT, RECIPE_VALUE, and those of `measure_tasks`.
    """
    raise_all(asked_tasks(settings)[2])  # before a weight is read
    opened = open_texts(stores, settings=settings)
    with staged(out, provenance=provenance, overwrite=overwrite) as folder:
        network = load_model(model).to("cuda" if torch.cuda.is_available() else "cpu")
        check_chunked_logits(network)
        texts = measure_texts(
            NetworkReader(network), opened, settings=settings, where=str(model), on_event=on_event
        )
        tasks = TaskScores({}, {}, {})
        if settings.asked:
            asker = ModelAsker(network, load_tokenizer(model), settings.micro_batch, on_event)
            known_by = f"{provenance.parents.get('model')} {provenance.settings.get('folder', '')}"
            tasks = measure_tasks(
                asker, settings, model=known_by, state=state, offline=offline, on_event=on_event
            )
        return _written(folder, texts, tasks)


def evaluate_server(
    endpoint: Endpoint,
    stores: Mapping[str, tuple[Path, int]],
    *,
    tokenizer: Path,
    about: Mapping[str, str] | None = None,
    settings: Evaluate,
    out: Path,
    provenance: Provenance,
    offline: bool = False,
    overwrite: bool = False,
    on_event: OnEvent,
) -> Evaluation:
    """Measure what a server answers as `evaluate_model` does a checkpoint, in the served dtype.

    `tokenizer` is a folder that holds the served model's; `about` says what a server of our own
    runs with, one of others is known by its address. Errors: INPUT_CORPUS, RECIPE_VALUE,
    ENGINE, GATE_NONFINITE, and those of `measure_tasks`.
    """
    opened = open_texts(stores, settings=settings)
    where = f"{endpoint.model} at {endpoint.url}"
    server = about or {"url": endpoint.url, "model": endpoint.model}
    provenance = replace(provenance, settings={**provenance.settings, "server": server})
    with staged(out, provenance=provenance, overwrite=overwrite) as folder:
        texts = measure_texts(endpoint, opened, settings=settings, where=where, on_event=on_event)
        tasks = TaskScores({}, {}, {})
        if settings.asked:
            loaded = load_tokenizer(tokenizer)
            asker = ServedAsker(endpoint, loaded, settings.micro_batch, on_event)
            # What a server serves may be another model the next time: nothing is kept of it.
            tasks = measure_tasks(
                asker, settings, model=where, state=None, offline=offline, on_event=on_event
            )
        return _written(folder, texts, tasks)


def _written(
    folder: Path, texts: Mapping[str, tuple[Loss, Units]], tasks: TaskScores
) -> Evaluation:
    losses = {name: loss for name, (loss, _) in texts.items()}
    dump(
        folder / EVALUATION,
        {
            "texts": {name: asdict(loss) for name, loss in losses.items()},
            "tasks": {name: asdict(score) for name, score in tasks.scores.items()},
            "left_out": dict(tasks.left_out),
        },
    )
    tasks.write_samples(folder)
    units = {name: units.as_json() for name, (_, units) in texts.items()}
    dump(folder / WINDOWS, {"schema": 1, "texts": units})
    return Evaluation(losses, tasks.scores)
