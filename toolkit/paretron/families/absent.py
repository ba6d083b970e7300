"""What a config leaves unsaid, said: the values that the model's own class takes for absent keys.

Everything that follows reads one meaning, and what is written later says it in full: a layer that
was the sixth need not be the sixth of a shallower model, nor need an engine guess alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paretron.errors import Code, ParetronError, Problem
from paretron.families.table import Family, sizes, spelled

_FULL, _WINDOW = "full_attention", "sliding_attention"
_BOTH_WAYS = "use_bidirectional_attention"
_FIRST_WINDOW_LAYER = 28  # of Qwen 2 and 3, when a config does not say


def explicit(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with every key that its family has a meaning for when it is absent.

    Errors: INPUT_CONFIG for sizes that are absent or absurd, and for layer kinds that do not fit.
    """
    out = {**config, **{k: v for k, v in family.absent.items() if k not in config}}
    out |= spelled(family, out)
    layers = sizes(family, out)["layers"]
    if out.get(_BOTH_WAYS):
        raise _wrong(_BOTH_WAYS, out[_BOTH_WAYS], "false: a causal language model")
    if out.get("layer_types") is None:
        found = _layer_types(family, out, layers)
        if found:
            out["layer_types"] = found
    elif not isinstance(out["layer_types"], list) or len(out["layer_types"]) != layers:
        raise _wrong("layer_types", out["layer_types"], f"a list of {layers} names, one a layer")
    return out


def _layer_types(family: Family, config: Mapping[str, Any], layers: int) -> list[str]:
    """The kind of every layer's attention, or nothing where all attend in full."""
    if family.full_attention_every:
        every = _count(config, "sliding_window_pattern", family.full_attention_every)
        return [_WINDOW if (i + 1) % every else _FULL for i in range(layers)]
    windowed = config.get("use_sliding_window") and config.get("sliding_window") is not None
    if family.full_attention_before and windowed:
        first = _count(config, family.full_attention_before, _FIRST_WINDOW_LAYER, least=0)
        return [_WINDOW if i >= first else _FULL for i in range(layers)]
    return []


def _count(config: Mapping[str, Any], key: str, default: int, *, least: int = 1) -> int:
    value = config.get(key)
    if value is None:
        return default
    if type(value) is not int or value < least:
        raise _wrong(key, value, f"a whole number from {least}")
    return value


def _wrong(key: str, value: object, allowed: str) -> ParetronError:
    return ParetronError(
        Problem(
            Code.INPUT_CONFIG, f"{key} is {str(value)[:60]!r}",
            where=f"config.json: {key}", fix=allowed,
        )
    )  # fmt: skip
