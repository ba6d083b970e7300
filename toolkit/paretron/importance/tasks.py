"""Accuracy on a multiple-choice task of lm-eval, measured on hidden states as losses are.

lm-eval reads the task, builds its prompts and judges the answers; the model is ours. A prompt and
each of its choices are tokens whose likelihood counts from the choice on, exactly as there.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from paretron.artifacts.models import load_tokenizer
from paretron.artifacts.reader import Checkpoint
from paretron.errors import Code, ParetronError, Problem
from paretron.importance.executor import Batch, LayerStack

# What lm-eval takes for a model's longest input when its config says nothing.
_LONGEST = 2048
_RUNS_CODE = re.compile(r"!function|^\s*(include|class)\s*:", re.MULTILINE)


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
    encoded = _encoded(checkpoint, task.instances)
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
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ParetronError(
            Problem(
                Code.OPTIONAL_MISSING,
                "lm-eval is not installed",
                where="score.depth.task",
                fix="pip install 'paretron[eval]'",
            )
        ) from error
    path = Path(name)
    local = path.suffix in (".yaml", ".yml")  # as `Depth.task_file` has it
    if local:
        _refuse_code(path)
    try:
        found = TaskManager(include_defaults=not local).load(str(path) if local else name)
    except Exception as error:  # of any kind: files, templates, data sets, the network
        reason = " ".join(str(error).split())[:300]
        raise ParetronError(
            Problem(
                Code.RECIPE_VALUE,
                f"lm-eval cannot load it: {type(error).__name__}: {reason}",
                where=f"score.depth.task: {name}",
                fix="`lm-eval ls tasks` lists those it knows; data sets are downloaded when first "
                "used",
            )
        ) from error
    tasks = list(found["tasks"].values())
    if len(tasks) != 1:
        raise _unsupported(name, f"it stands for {len(tasks)} tasks", "one task")
    return tasks[0]


def _refuse_code(path: Path) -> None:
    if not path.is_file():
        raise ParetronError(
            Problem(
                Code.INPUT_MISSING,
                "no such file",
                where=f"score.depth.task: {path}",
                fix="name a task's YAML file, or a task that lm-eval knows",
            )
        )
    if found := _RUNS_CODE.search(path.read_text("utf-8", "replace")):
        raise _unsupported(
            str(path), f"{found.group().strip()!r} may run code", "templates and data alone"
        )


def _unsupported(name: str, cause: str, fix: str) -> ParetronError:
    return ParetronError(
        Problem(Code.UNSUPPORTED, cause, where=f"score.depth.task: {name}", fix=fix)
    )


def _encoded(checkpoint: Checkpoint, instances: Sequence[Any]) -> list[tuple[list[int], list[int]]]:
    """Prompt and choice of every request as tokens, by lm-eval's own rules."""
    from lm_eval.api.model import TemplateLM

    tokenizer = load_tokenizer(checkpoint.path)
    first = tokenizer.bos_token_id
    prefix = tokenizer.eos_token_id if first is None else first

    class Encoder(TemplateLM):
        """A model for lm-eval that runs nothing: it notes what it would have been given."""

        backend = "causal"

        def __init__(self) -> None:
            super().__init__()
            self.seen: list[tuple[list[int], list[int]]] = []

        @property
        def eot_token_id(self) -> int:
            return int(tokenizer.eos_token_id)

        @property
        def prefix_token_id(self) -> int:
            return int(prefix)

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **_: object
        ) -> list[int]:
            if add_special_tokens is None:
                add_special_tokens = not string.startswith(tokenizer.decode([prefix]))
            return list(tokenizer.encode(string, add_special_tokens=add_special_tokens))

        def _loglikelihood_tokens(
            self, requests: list[tuple[Any, list[int], list[int]]], **_: object
        ) -> list[tuple[float, bool]]:
            self.seen += [(context, choice) for _, context, choice in requests]
            return [(0.0, False)] * len(requests)

        def loglikelihood_rolling(self, requests: object, disable_tqdm: bool = False) -> list[Any]:
            raise NotImplementedError

        def generate_until(self, requests: object, disable_tqdm: bool = False) -> list[Any]:
            raise NotImplementedError

    encoder = Encoder()
    encoder.loglikelihood(list(instances), disable_tqdm=True)
    return encoder.seen
