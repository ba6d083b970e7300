"""lm-eval: it reads tasks, builds their prompts and judges the answers; who answers is ours.

The only file that imports it. Whoever answers works on tokens, by lm-eval's own rules of cutting a
text into a prompt and what follows it, so that figures are those of lm-eval's own models.
"""

from __future__ import annotations

import io
import json
import math
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from paretron.data.answers import SEED, Asker, Judged, Tokens, judged
from paretron.data.taskfiles import (
    code_refused,
    known_tasks,
    lm_eval_missing,
    read_task,
    reads_own_files,
    shipped_file,
    ships_unsafe,
    unknown_task,
)
from paretron.errors import Code, ParetronError, Problem
from paretron.recipe import Task

T = TypeVar("T")
_BOOTSTRAPS = 1000  # of metrics that are no means
_DRAWN = {"do_sample", "temperature", "top_p", "until", "max_gen_toks"}
_NEUTRAL = {"num_beams": 1}


@dataclass(frozen=True)
class LoadedTask:
    """One task of lm-eval with its documents, or those of a group that are one figure together."""

    name: str
    leaves: Mapping[str, Any]  # lm_eval.api.task.Task by name
    metric: str | None  # of a group


def load_tasks(
    task: str, *, where: str, run_code: bool = False, offline: bool = False
) -> tuple[LoadedTask, ...]:
    """The task of that name or file, ready to be asked; a group that states no mean is several.

    Data sets are downloaded when first used, never with `offline`. Errors: OPTIONAL_MISSING without
    lm-eval, INPUT_MISSING, INPUT_OFFLINE, RECIPE_VALUE when lm-eval cannot load it, UNSUPPORTED for
    what runs code without leave.
    """
    if (missing := lm_eval_missing(where)) is not None:
        raise ParetronError(missing)
    spec = _spec(task, where)
    if run_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # asked for by the metric that runs code
    random.seed(0)  # as lm-eval does: some tasks draw their documents
    np.random.seed(SEED)
    # The library would tell the hub of every reading, also of one's own files.
    with _quiet(), _no_hub(offline or reads_own_files(spec)):
        try:
            found = _manager(with_shipped=spec == task).load(spec)
        except Exception as error:  # of any kind: files, templates, data sets, the network
            raise _unloadable(task, where, error, offline=offline) from error
    tasks = found["tasks"]
    for name, one in tasks.items():
        unsaid = not isinstance(spec, dict) and ships_unsafe(name)
        if not run_code and (getattr(one, "UNSAFE_CODE", False) or unsaid):
            raise ParetronError(code_refused(where))
    if metric := mean_of_group(found, task):
        return (LoadedTask(task, tasks, metric),)
    return tuple(LoadedTask(name, {name: one}, None) for name, one in tasks.items())


def _spec(task: str, where: str) -> str | dict[str, Any]:
    """What lm-eval is given: a name, the file that it ships of one task, or a file's content."""
    file = Task(task=task).file
    if file is None:
        if task not in known_tasks():
            raise ParetronError(unknown_task(task, where=where))
        return str(shipped_file(task) or task)
    content = read_task(file, where=where)
    import lm_eval.api.metrics  # noqa: F401 - fills the registry
    from lm_eval.api.registry import metric_registry

    for named in content.get("metric_list") or []:
        metric = named.get("metric") if isinstance(named, dict) else named
        if metric not in metric_registry:  # it would be fetched from the hub, as code
            cause = f"lm-eval has no metric {str(metric)[:60]!r}"
            fix = f"one of {', '.join(sorted(metric_registry))}"
            raise ParetronError(Problem(Code.RECIPE_VALUE, cause, where=where, fix=fix))
    return content


@cache
def _manager(*, with_shipped: bool) -> Any:
    """lm-eval's loader; that of groups and tags reads all that it ships, which takes seconds."""
    import lm_eval.utils
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval.tasks import TaskManager

    # A template is data: it may format a document, not reach Python through it.
    given = lm_eval.utils.env
    sandbox = SandboxedEnvironment(
        loader=given.loader, undefined=given.undefined, keep_trailing_newline=True
    )
    sandbox.filters.update(given.filters)
    lm_eval.utils.env = sandbox
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # bootstraps in a pool would copy the model
    return TaskManager(include_defaults=with_shipped)


def mean_of_group(found: Mapping[str, Any], name: str) -> str | None:
    """The metric that a group is the mean of, over all its documents alike; None if it is not."""
    group = found.get("groups", {}).get(name)
    metrics = (group.aggregate_metric_list or []) if group is not None else []
    return metrics[0].metric if metrics and metrics[0].weight_by_size else None


def _unloadable(task: str, where: str, error: Exception, *, offline: bool) -> ParetronError:
    reason = " ".join(str(error).split())[:300]
    cause = f"lm-eval cannot load it: {type(error).__name__}: {reason}"
    if offline and isinstance(error, ConnectionError | FileNotFoundError):
        fix = "run once without --offline, so that its data set is in the hub's cache"
        return ParetronError(Problem(Code.INPUT_OFFLINE, cause, where=where, fix=fix))
    fix = "data sets are downloaded when first used; the task's file says which"
    return ParetronError(Problem(Code.RECIPE_VALUE, cause, where=where, fix=fix))


@contextmanager
def _quiet() -> Iterator[None]:
    """Bars and words of lm-eval's own would tear ours, and JSON on standard output."""
    with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
        yield


@contextmanager
def _no_hub(offline: bool) -> Iterator[None]:
    """No request of `datasets` or the hub's library while `offline`."""
    if not offline:
        yield
        return
    import datasets.config
    import huggingface_hub.constants

    before = datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE = before


def judge(
    name: str, task: Any, asker: Asker, *, asked: Task, where: str, group_metric: str | None = None
) -> Judged:
    """Ask a model every question of a task, or the first `asked.limit`, and judge its answers.

    Errors: RECIPE_VALUE for settings that the task has no room for and for templates that fail,
    UNSUPPORTED for ways of answering that are not had here, GATE_NONFINITE.
    """
    from lm_eval.evaluator import evaluate

    _set_up(task, asked, where)
    model = _Model(asker, where).as_lm()
    try:
        with _quiet():
            found = evaluate(
                lm=model,
                task_dict={"tasks": {name: task}},
                limit=asked.limit,
                bootstrap_iters=_BOOTSTRAPS,
                confirm_run_unsafe_code=True,  # `load_tasks` asked for leave
            )
    except ParetronError:
        raise
    except Exception as error:
        if model.failed is error:
            raise
        reason = " ".join(str(error).split())[:300]
        cause = f"lm-eval cannot ask or judge it: {type(error).__name__}: {reason}"
        fix = "compare the task's templates with its documents"
        raise ParetronError(Problem(Code.RECIPE_VALUE, cause, where=where, fix=fix)) from error
    return judged(name, found, metric=asked.metric or group_metric, where=where)


def _set_up(task: Any, asked: Task, where: str) -> None:
    """The number of examples and the way of drawing answers; what a task refuses is told."""
    stated = task.get_config("num_fewshot")
    if asked.few_shot is not None and stated == 0 and asked.few_shot > 0:
        cause = f"its prompt leaves no room for {asked.few_shot} examples: it states 0"
        raise ParetronError(
            Problem(Code.RECIPE_VALUE, cause, where=where, fix="few_shot: 0, or leave it out")
        )
    task.set_config(key="num_fewshot", value=asked.few_shot if asked.few_shot is not None
                    else stated or 0)  # fmt: skip
    task.set_fewshot_seed(seed=SEED)
    if asked.sampling is None:
        return
    if task.OUTPUT_TYPE != "generate_until":
        cause = f"sampling is for tasks that generate, this one asks for {task.OUTPUT_TYPE}"
        raise ParetronError(
            Problem(Code.RECIPE_VALUE, cause, where=where, fix="leave sampling out")
        )
    drawn = {"do_sample": True, "temperature": asked.sampling.temperature}
    drawn["top_p"] = asked.sampling.top_p
    task.set_config(key="generation_kwargs", value=drawn, update=True)
    task.set_config(key="repeats", value=asked.sampling.samples)


class _Model:
    """An asker as lm-eval wants a model."""

    def __init__(self, asker: Asker, where: str) -> None:
        self._asker, self._where = asker, where
        self._shown = sys.stderr, sys.stdout

    def as_lm(self) -> Any:
        """The lm_eval.api.model.LM; `failed` holds an error of the asker's own."""
        from lm_eval.api.model import TemplateLM
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        asker, tokenizer = self._asker, self._asker.tokenizer
        likelihoods, ask, kwargs_of = self._likelihoods, self._ask, self._generation

        class Answers(TemplateLM):
            backend = "causal"
            failed: Exception | None = None

            @property
            def eot_token_id(self) -> int:
                return int(tokenizer.eos_token_id)

            @property
            def prefix_token_id(self) -> int:
                first = tokenizer.bos_token_id
                return int(tokenizer.eos_token_id if first is None else first)

            def tok_encode(
                self, string: str, add_special_tokens: bool | None = None, **_: object
            ) -> list[int]:
                if add_special_tokens is None:
                    begun = tokenizer.decode([self.prefix_token_id])
                    add_special_tokens = not string.startswith(begun)
                return list(tokenizer.encode(string, add_special_tokens=add_special_tokens))

            def loglikelihood(
                self, requests: list[Any], disable_tqdm: bool = True
            ) -> list[tuple[float, bool]]:
                found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
                return found

            def _loglikelihood_tokens(
                self, requests: list[tuple[Any, list[int], list[int]]], **_: object
            ) -> list[tuple[float, bool]]:
                return likelihoods(self, [(context, choice) for _, context, choice in requests])

            def loglikelihood_rolling(
                self, requests: list[Any], disable_tqdm: bool = True
            ) -> list[float]:
                windows = [
                    [
                        make_disjoint_window(window)
                        for window in get_rolling_token_windows(
                            token_list=self.tok_encode(request.args[0]),
                            prefix_token=self.prefix_token_id,
                            max_seq_len=asker.max_length,
                            context_len=1,
                        )
                    ]
                    for request in requests
                ]
                pairs = [pair for own in windows for pair in own]
                found = iter(likelihoods(self, pairs))
                return [sum(next(found)[0] for _ in own) for own in windows]

            def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
                texts: list[str] = [""] * len(requests)
                alike: dict[str, list[int]] = {}
                for k, request in enumerate(requests):
                    alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(k)
                for numbers in alike.values():
                    prompts = [self.tok_encode(requests[k].args[0]) for k in numbers]
                    kwargs = kwargs_of(requests[numbers[0]].args[1])
                    found = ask(self, partial(asker.generate, prompts, **kwargs))
                    for k, text in zip(numbers, found, strict=True):
                        texts[k] = text
                return texts

        return Answers()

    def _likelihoods(
        self, lm: Any, pairs: Sequence[tuple[Tokens, Tokens]]
    ) -> list[tuple[float, bool]]:
        """What the asker says of the pairs; lm-eval would take NaN for the likeliest answer."""
        longest = self._asker.max_length
        for _, answer in pairs:
            if not 0 < len(answer) <= longest:
                raise self._unsupported(
                    f"an answer of {len(answer)} tokens cannot be looked at in a context of "
                    f"{longest}"
                )

        def numbers() -> list[tuple[float, bool]]:
            found = self._asker.log_likelihoods(pairs)
            if any(math.isnan(nats) for nats, _ in found):
                cause = "the likelihood of an answer is not a number"
                fix = "use a checkpoint whose training did not diverge"
                problem = Problem(Code.GATE_NONFINITE, cause, where=self._where, fix=fix)
                raise ParetronError(problem)
            return found

        return self._ask(lm, numbers)

    def _ask(self, lm: Any, answer: Callable[[], T]) -> T:
        """Call the asker with its own words shown, and remember an error that is its own."""
        try:
            with redirect_stderr(self._shown[0]), redirect_stdout(self._shown[1]):
                return answer()
        except Exception as error:
            lm.failed = error
            raise

    def _generation(self, stated: Mapping[str, Any]) -> dict[str, Any]:
        """What a task says of generation, as an asker takes it."""
        from lm_eval.models.utils import normalize_gen_kwargs

        settings = dict(normalize_gen_kwargs(dict(stated)))
        other = [k for k in settings if k not in _DRAWN and settings[k] != _NEUTRAL.get(k)]
        if other:
            raise self._unsupported(f"it asks for {other[0]}: {settings[other[0]]} in generation")
        max_tokens = int(settings["max_gen_toks"])
        if max_tokens >= self._asker.max_length:
            raise self._unsupported(
                f"answers of up to {max_tokens} tokens leave no room for a question in a context "
                f"of {self._asker.max_length}"
            )
        drawn = bool(settings.get("do_sample"))
        return {
            "max_tokens": max_tokens,
            "until": [text for text in settings.get("until") or [] if text],
            "temperature": float(settings.get("temperature", 1.0)) if drawn else 0.0,
            "top_p": float(settings.get("top_p", 1.0)) if drawn else 1.0,
        }

    def _unsupported(self, cause: str) -> ParetronError:
        fix = "another task, or a file of your own that asks otherwise"
        return ParetronError(Problem(Code.UNSUPPORTED, cause, where=self._where, fix=fix))


def pairs_of(task: Any, tokenizer: PreTrainedTokenizerBase) -> list[tuple[Tokens, Tokens]]:
    """Prompt and choice of each of a task's requests as tokens, by lm-eval's own rules."""
    noted: list[tuple[Tokens, Tokens]] = []
    _Model(_Noting(tokenizer, noted), where="").as_lm().loglikelihood(list(task.instances))
    return noted


@dataclass(frozen=True)
class _Noting:
    """An asker that runs nothing: it notes what it would have been given."""

    tokenizer: PreTrainedTokenizerBase
    noted: list[tuple[Tokens, Tokens]]
    max_length: int = sys.maxsize

    def log_likelihoods(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[tuple[float, bool]]:
        self.noted.extend(pairs)
        return [(0.0, False)] * len(pairs)

    def generate(self, prompts: Sequence[Tokens], **_: object) -> list[str]:
        return [""] * len(prompts)
