"""Accuracy on a multiple-choice task of lm-eval, measured on hidden states as losses are.

lm-eval reads the task, builds its prompts and judges the answers; the model is ours. A prompt and
each of its choices are tokens whose likelihood counts from the choice on, exactly as there.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from typing import Any

import torch

from paretron.artifacts.models import load_tokenizer
from paretron.artifacts.reader import Checkpoint
from paretron.data.harness import load_tasks, pairs_of
from paretron.errors import Code, ParetronError, Problem
from paretron.importance.executor import Batch, LayerStack

# What lm-eval takes for a model's longest input when its config says nothing.
_LONGEST = 2048


@dataclass(frozen=True)
class Request:
    """One choice after its prompt: the tokens to run, and the last `choice` of the targets."""

    document: int
    tokens: tuple[int, ...]  # all but the last one are run
    choice: int


@dataclass(frozen=True)
class TaskMeasure:
    """The accuracy ("acc") of a task over all its documents; one batch holds whole requests.

    `own[k]` are the numbers of the requests in batch k of this process, among all `requests`.
    """

    task: Any  # lm_eval.api.task.Task
    documents: Sequence[Mapping[str, Any]]
    requests: Sequence[Request]
    own: Sequence[Sequence[int]]
    batches: Sequence[Batch]

    def nothing(self) -> torch.Tensor:
        """No likelihood of any request yet, and no word on whether it is the likeliest."""
        return torch.zeros((len(self.requests), 2), dtype=torch.float64)

    def part(self, stack: LayerStack, hidden_BTD: torch.Tensor, batch: int) -> torch.Tensor:
        """Log-likelihood in nats of each choice in the batch, and 1 where it is the likeliest."""
        found = self.nothing()
        normed = stack.final_norm(hidden_BTD)
        for row, number in enumerate(self.own[batch]):
            request = self.requests[number]
            end = len(request.tokens) - 1
            states = normed[row, end - request.choice : end]
            targets = torch.tensor(request.tokens[-request.choice :])
            likelihoods, likeliest = stack.log_likelihoods(states, targets)
            found[number, 0] = float(likelihoods.sum(dtype=torch.float64))
            found[number, 1] = float(likeliest.all())
        return found

    def value(self, sums: torch.Tensor) -> float:
        """The share of documents whose answer the task counts as right."""
        answers: list[list[tuple[float, bool]]] = [[] for _ in self.documents]
        for request, (likelihood, likeliest) in zip(self.requests, sums.tolist(), strict=True):
            answers[request.document].append((likelihood, likeliest > 0))
        judged = [
            float(self.task.process_results(document, results)["acc"])
            for document, results in zip(self.documents, answers, strict=True)
        ]
        return sum(judged) / len(judged)

    def cost(self, value: float) -> float:
        """A lower accuracy is worse."""
        return -value


def task_measure(
    checkpoint: Checkpoint,
    name: str,
    *,
    documents: int,
    micro_batch: int,
    rank: int = 0,
    ranks: int = 1,
) -> TaskMeasure:
    """A task by its name in lm-eval or by a YAML file, on at most so many of its first documents.

    The requests are shared by the processes in turn. A file's templates are run: name only what
    you trust. Errors: OPTIONAL_MISSING without lm-eval, RECIPE_VALUE when it does not know the
    task, UNSUPPORTED when the task is not one of multiple choice or wants to run code.
    """
    with redirect_stderr(io.StringIO()):  # bars of its own would tear ours
        task = _load(name)
        if task.OUTPUT_TYPE != "multiple_choice":
            raise _unsupported(name, f"it asks for {task.OUTPUT_TYPE}", "a multiple-choice task")
        task.build_all_requests(limit=documents, rank=0, world_size=1)
    documents_by_id = dict(task.doc_iterator(rank=0, limit=documents, world_size=1))
    places = {doc_id: k for k, doc_id in enumerate(documents_by_id)}
    encoded = pairs_of(task, load_tokenizer(checkpoint.path))
    longest = checkpoint.config.get("max_position_embeddings") or _LONGEST
    requests = [
        Request(places[i.doc_id], (*context, *choice)[-(longest + 1) :], len(choice))
        for i, (context, choice) in zip(task.instances, encoded, strict=True)
    ]
    # Requests of about one length pad each other least; equal ones keep their order.
    order = sorted(range(len(requests)), key=lambda k: len(requests[k].tokens))[rank::ranks]
    own = [order[k : k + micro_batch] for k in range(0, len(order), micro_batch)]
    batches = [_batch([requests[k] for k in numbers]) for numbers in own]
    return TaskMeasure(task, list(documents_by_id.values()), requests, own, batches)


def _batch(requests: Sequence[Request]) -> Batch:
    ids = [torch.tensor(r.tokens[:-1]) for r in requests]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    return Batch(padded, tuple(len(x) for x in ids))


def _load(name: str) -> Any:
    """The one task of that name."""
    tasks = [one for t in load_tasks(name, where=_where(name)) for one in t.leaves.values()]
    if len(tasks) != 1:
        raise _unsupported(name, f"it stands for {len(tasks)} tasks", "one task")
    return tasks[0]


def _where(name: str) -> str:
    return f"score.depth.task: {name}"


def _unsupported(name: str, cause: str, fix: str) -> ParetronError:
    return ParetronError(Problem(Code.UNSUPPORTED, cause, where=_where(name), fix=fix))
