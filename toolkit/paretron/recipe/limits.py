"""What part of a recipe cannot be had, said alike when planning and when running."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from paretron.errors import Code, Problem
from paretron.recipe.profiling import Engine, Profile
from paretron.recipe.training import Loss, States

MODE_KEYS: Mapping[str, str] = {"offline": "batches", "closed": "concurrency", "open": "rates"}
_SERVER = "add an engine that serves over HTTP, such as vllm_server or openai"
_WOULD_DO = {"offline": "add an engine such as transformers", "closed": _SERVER, "open": _SERVER}


def batch_problems(profile: Profile, *, engine: str, largest_batch: int | None) -> list[Problem]:
    """The recipe's batches above an engine's largest; none where only memory limits it."""
    return [
        Problem(
            Code.RECIPE_VALUE,
            f"{engine} takes batches of at most {largest_batch}, not {batch}",
            where="profile.batches",
            fix=f"at most {largest_batch}",
        )
        for batch in profile.batches
        if largest_batch is not None and batch > largest_batch
    ]


def address_problems(engine: Engine, *, models: Collection[str]) -> list[Problem]:
    """The models that an engine's `servers` leave out, and what they or `ports` name besides."""
    left_out = [m for m in models if m not in engine.servers] if engine.servers else []
    problems = [unserved(engine, model) for model in left_out]
    for key, named in (("servers", engine.servers), ("ports", engine.ports)):
        problems += [
            Problem(
                Code.RECIPE_VALUE,
                f"there is no model called {name}",
                where=f"profile.engines: {engine.name}: {key}",
                fix=f"one of {', '.join(models)}",
            )
            for name in named
            if name not in models
        ]
    return problems


def unserved(engine: Engine, model: str) -> Problem:
    """What is wrong where some models have a server and this one has none."""
    return Problem(
        Code.RECIPE_VALUE,
        f"no server is named for the model {model}",
        where=f"profile.engines: {engine.name}: servers",
        fix=f"add {model}: http://..., or leave the model out",
    )


def mode_problems(profile: Profile, *, modes: Mapping[str, Collection[str]]) -> list[Problem]:
    """The loads that no engine can be put under, and the engines that are left without any.

    `modes` are those of each engine, by its name. A load that one engine lacks and another has is
    left to that one.
    """
    problems = []
    for mode in profile.loads:
        if modes and not any(mode in those for those in modes.values()):
            names, key = ", ".join(modes), MODE_KEYS[mode]
            problems.append(
                Problem(
                    Code.RECIPE_VALUE,
                    f"{names} cannot be put under such a load",
                    where=f"profile.{key}",
                    fix=f"{_WOULD_DO[mode]}, or leave `{key}` out",
                )
            )
    for name, those in modes.items():
        if not set(those) & set(profile.loads):
            keys = [MODE_KEYS[mode] for mode in MODE_KEYS if mode in those]
            problems.append(
                Problem(
                    Code.RECIPE_VALUE,
                    f"nothing is left to measure on {name}",
                    where="profile.engines",
                    fix=f"state `{'` or `'.join(keys)}`, or leave {name} out",
                )
            )
    return problems


def loss_problems(
    loss: Loss, *, vocab: int, teacher_layers: int, layers: int, apart: bool
) -> list[Problem]:
    """A `top_k` that leaves no token over, and `states` of layers that teacher or student lack.

    With documents `apart`, also relations between the positions of a whole window.
    """
    problems = []
    if loss.top_k is not None and loss.top_k >= vocab:
        cause = f"{loss.top_k} of a vocabulary of {vocab} tokens"
        problems.append(_value("top_k", cause, f"at most {vocab - 1}, or leave it out"))
    states = loss.states or States()
    if apart and states.attention:
        cause = "they relate every position of a window to every other, of all its documents"
        problems.append(_value("states.attention", cause, "data.train.documents: joined"))
    for kind in ("output", "mlp_input", "attention"):
        for teacher, student in getattr(states, kind):
            if teacher >= teacher_layers or student >= layers:
                cause = f"[{teacher}, {student}] of {teacher_layers} and {layers} layers"
                fix = f"at most [{teacher_layers - 1}, {layers - 1}]: layers count from 0"
                problems.append(_value(f"states.{kind}", cause, fix))
    return problems


def peft_missing() -> Problem:
    """What is said where adapters are asked for and the library that makes them is absent."""
    return Problem(
        Code.OPTIONAL_MISSING,
        "LoRA adapters need peft, which is not installed",
        where="correct.what",
        fix='pip install "paretron[lora]"',
    )


def _value(key: str, cause: str, fix: str) -> Problem:
    return Problem(Code.RECIPE_VALUE, cause, where=f"distill.loss.{key}", fix=fix)
