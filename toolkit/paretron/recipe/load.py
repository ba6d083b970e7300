"""From a YAML file and --set overrides to a checked recipe, with every error at once."""

from __future__ import annotations

import difflib
import os
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from paretron.errors import Code, ParetronError, Problem, raise_all, redacted
from paretron.recipe.models import Recipe
from paretron.recipe.students import Student
from paretron.recipe.texts import TextSource, TokenisedSource
from paretron.recipe.yamlfile import parse_scalar, read_yaml


def load_recipe(path: Path, *, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a file with `a.b=c` overrides; relative paths are the recipe's neighbours.

    Errors: RECIPE_SYNTAX, RECIPE_UNKNOWN_KEY (with the closest key), RECIPE_VALUE; all at once.
    """
    raw = read_yaml(path)
    problems: list[Problem] = []
    for text in overrides:
        try:
            _override(raw, text)
        except ParetronError as error:
            problems += error.problems
    raise_all(problems)
    return resolve_recipe(raw, where=str(path), base=path.parent)


def resolve_recipe(raw: Mapping[str, Any], *, where: str, base: Path) -> Recipe:
    """Check plain data and resolve local paths against `base`."""
    problems = [_secret(key, where) for key in _secrets(raw)]
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        raise ParetronError(*(_problem(e, where) for e in error.errors()), *problems) from error
    raise_all(problems)
    return _with_paths(recipe, base)


def keys_of() -> Iterator[str]:
    """Every key of a recipe that has a value of its own, as `--set` spells it; NAME is a name."""
    return _keys_below(Recipe, ())


def _keys_below(model: type[BaseModel], path: tuple[str, ...]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        here = (*path, field.alias or name)
        inner = _model_in(field.annotation)
        if inner is None:
            yield ".".join(here)
        elif _is_list(field.annotation):
            yield from _keys_below(inner, (*here, "0"))
        else:
            named = ("NAME",) if _is_mapping(field.annotation) else ()
            yield from _keys_below(inner, (*here, *named))


def _secrets(node: object, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Where access tokens stand: what a run saves must hold none."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            here = (*path, str(key))
            if redacted(str(key)) != str(key):
                yield ".".join(here)
            yield from _secrets(value, here)
    elif isinstance(node, list):
        for k, value in enumerate(node):
            yield from _secrets(value, (*path, str(k)))
    elif isinstance(node, str) and redacted(node) != node:
        yield ".".join(path)


def _secret(key: str, where: str) -> Problem:
    return Problem(
        Code.RECIPE_VALUE,
        "an access token, which would be saved with the run",
        where=f"{where}: {key}",
        fix="remove it and make it void; a hub is entered with `hf auth login`",
    )


def _override(raw: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not all(part for part in key.split(".")):
        raise ParetronError(
            Problem(
                Code.USAGE,
                f"{text[:80]!r} is not key=value",
                where="--set",
                fix="for example --set distill.lr=1e-4",
            )
        )
    *parents, last = key.split(".")
    node: Any = raw
    for part in parents:
        node = _child(node, part, text)
    if isinstance(node, list):
        node[_index(node, last, text)] = parse_scalar(value)
    else:
        node[last] = parse_scalar(value)


def _child(node: Any, part: str, text: str) -> Any:
    if isinstance(node, list):
        child = node[_index(node, part, text)]
    else:
        child = node.get(part)
        if child is None:
            child = node[part] = {}
    if not isinstance(child, dict | list):
        raise ParetronError(
            Problem(
                Code.USAGE,
                f"{part} holds a value, not a section",
                where=f"--set {text[:200]}",
                fix=f"end the key at {part}",
            )
        )
    return child


def _index(node: list[Any], part: str, text: str) -> int:
    if not (part.isascii() and part.isdigit() and len(part) < 9) or int(part) >= len(node):
        raise ParetronError(
            Problem(
                Code.USAGE,
                f"{part!r} is not a position in a list of {len(node)}",
                where=f"--set {text[:200]}",
                fix="a number from 0, as in --set export.0.to=hf",
            )
        )
    return int(part)


def _with_paths(recipe: Recipe, base: Path) -> Recipe:
    """Relative paths in a recipe are relative to the recipe, wherever it is run from."""

    def near(text: str) -> str:
        return str((base / os.path.expanduser(text)).absolute())

    def near_text(source: TextSource) -> TextSource:
        if isinstance(source, TokenisedSource) and source.sources:
            return source.model_copy(update={"sources": tuple(map(near_text, source.sources))})
        return source.model_copy(update={"path": near(source.path)}) if source.path else source

    data = recipe.data.model_copy(update={name: near_text(source) for name, source in recipe.data})
    teacher = recipe.teacher
    if teacher.model is not None and _is_local(teacher.model, base):
        teacher = teacher.model_copy(update={"model": near(teacher.model)})
    if teacher.pretrain is not None:
        pretrain = teacher.pretrain.model_copy(update={"data": near_text(teacher.pretrain.data)})
        teacher = teacher.model_copy(update={"pretrain": pretrain})
    profile = recipe.profile
    if profile is not None:
        engines = tuple(
            # absolute, not resolved: a virtual environment is known by its link's place
            e.model_copy(update={"python": Path(near(str(e.python)))}) if e.python else e
            for e in profile.engines
        )
        profile = profile.model_copy(update={"engines": engines})
    students = {name: _near_table(student, near) for name, student in recipe.students.items()}
    score = recipe.score
    if score.depth.task_file is not None:
        depth = score.depth.model_copy(update={"task": near(str(score.depth.task))})
        score = score.model_copy(update={"depth": depth})
    tasks = (
        t.model_copy(update={"task": near(t.task)}) if t.file else t for t in recipe.evaluate.tasks
    )
    evaluate = recipe.evaluate.model_copy(update={"tasks": tuple(tasks)})
    return recipe.model_copy(
        update={
            "data": data, "teacher": teacher, "profile": profile, "students": students,
            "score": score, "evaluate": evaluate,
        }
    )  # fmt: skip


def _near_table(student: Student, near: Callable[[str], str]) -> Student:
    """A student whose search names an operator table, by that table's absolute path."""
    search = student.search
    if search is None or search.budget.speed is None or search.budget.speed.table is None:
        return student
    table = near(search.budget.speed.table)
    speed = search.budget.speed.model_copy(update={"table": table})
    budget = search.budget.model_copy(update={"speed": speed})
    return student.model_copy(update={"search": search.model_copy(update={"budget": budget})})


def _is_local(model: str, base: Path) -> bool:
    """A path by its look or because it is there; anything else is a hub id."""
    return model.startswith((".", "/", "~")) or os.path.exists(base / model)


def _problem(error: ErrorDetails, file: str) -> Problem:
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    where = f"{file}: {key}" if key else file
    if error["type"] == "extra_forbidden":
        allowed = _keys_at(location[:-1])
        close = difflib.get_close_matches(location[-1], allowed, n=1, cutoff=0.5)
        fix = f"did you mean {close[0]}?" if close else f"allowed: {', '.join(allowed)}"
        cause = f"unknown key {location[-1][:80]!r}"
        return Problem(Code.RECIPE_UNKNOWN_KEY, cause, where=where, fix=fix)
    cause = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return Problem(Code.RECIPE_VALUE, cause, where=where, fix=f"add {key}")
    if error["type"] != "value_error":
        cause += f" (found {_shown(error['input'])})"
    if location[-1:] == ["[key]"]:
        fix = "a name has lower-case letters, digits, - and _, at most 40"
        return Problem(Code.RECIPE_VALUE, cause, where=where.removesuffix(".[key]"), fix=fix)
    if error["type"] == "invalid_key":
        return Problem(Code.RECIPE_VALUE, cause, where=where, fix="remove it, or quote it")
    fix = f"change it in the recipe, or with --set {key}=VALUE" if key else "change the recipe"
    return Problem(Code.RECIPE_VALUE, cause, where=where, fix=_nearest(error) or fix)


def _nearest(error: ErrorDetails) -> str:
    """The nearest value that a bound of a whole number allows."""
    bounds = error.get("ctx", {})
    if not isinstance(error["input"], int):
        return ""
    for bound, nearest in (("gt", 1), ("ge", 0), ("le", 0), ("lt", -1)):
        if isinstance(bounds.get(bound), int):
            return f"nearest: {bounds[bound] + nearest}"
    return ""


def _shown(value: object) -> str:
    return repr(value)[:80]


def _keys_at(location: Sequence[str]) -> list[str]:
    """The keys that a section at this place of a recipe may have."""
    model: Any = Recipe
    for part in location:
        field = model.model_fields.get(part)
        if field is not None:  # else a list's position or a mapping's own key: the same section
            model = _model_in(field.annotation) or model
    return [f.alias or name for name, f in model.model_fields.items()]


def _model_in(annotation: Any) -> Any:
    """The section model inside Optional, tuple[X, ...] or dict[str, X]; None when there is none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, tuple, dict) or get_args(annotation):
        found = [m for m in map(_model_in, get_args(annotation)) if m is not None]
        return found[0] if found else None
    return None


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) is tuple


def _is_mapping(annotation: Any) -> bool:
    return get_origin(annotation) is dict
