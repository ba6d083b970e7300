"""Values of a config that engines act on: their types, and the closed sets that names come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from paretron.errors import Code, ParetronError, Problem
from paretron.families import Family

# What the keys that we read ourselves may hold, besides null.
_TYPES: Mapping[str, tuple[tuple[type, ...], str]] = {
    "tie_word_embeddings": ((bool,), "true or false"),
    "attention_bias": ((bool,), "true or false"),
    "mlp_bias": ((bool,), "true or false"),
    "rope_theta": ((int, float), "a number"),
    "partial_rotary_factor": ((int, float), "a number"),
    "rope_parameters": ((dict,), "an object"),
    "rope_scaling": ((dict,), "an object"),
}
ACTIVATIONS = (
    "gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python",
    "gelu_python_tanh", "gelu_pytorch_tanh", "hardswish", "laplace", "leaky_relu", "linear",
    "mish", "quick_gelu", "relu", "relu2", "relu6", "sigmoid", "silu", "swish", "tanh",
)  # fmt: skip
ROPE_TYPES = (
    "default", "dynamic", "linear", "llama3", "longrope", "mrope", "proportional", "su", "yarn",
)  # fmt: skip
_ROPE_NAMES = ("rope_type", "type")
_ROPE_LISTS = ("long_factor", "short_factor", "mrope_section")
_ROPE_NUMBERS = (
    "attention_factor", "beta_fast", "beta_slow", "factor", "high_freq_factor", "long_mscale",
    "low_freq_factor", "mscale", "mscale_all_dim", "original_max_position_embeddings",
    "partial_rotary_factor", "rope_theta", "short_mscale",
)  # fmt: skip


def check_values(family: Family, config: Mapping[str, Any]) -> None:
    """INPUT_CONFIG for a value of another type or set than engines know; null is no value."""
    if config.get("quantization_config") is not None:
        raise ParetronError(
            Problem(
                Code.INPUT_CONFIG,
                "the weights are quantised",
                where="config.json: quantization_config",
                fix="start from the checkpoint that was not quantised",
            )
        )
    _check_types(config)
    activation = config.get(family.activation)
    if activation is not None and activation not in ACTIVATIONS:
        raise _wrong(family.activation, activation, f"one of {', '.join(ACTIVATIONS)}")
    for key, rope in _ropes(config):
        _check_rope(key, rope)


def _check_types(config: Mapping[str, Any]) -> None:
    for key, (types, allowed) in _TYPES.items():
        value = config.get(key)
        # A bool is an int to Python, but no number to a config.
        wrong = not isinstance(value, types) or (isinstance(value, bool) and bool not in types)
        if value is not None and wrong:
            raise _wrong(key, value, allowed)


def _ropes(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every rotary embedding that a config describes; some have one for each kind of layer."""
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key) or {}
        yield key, rope
        yield from ((f"{key}.{k}", v) for k, v in rope.items() if isinstance(v, dict))


def _check_rope(key: str, rope: Mapping[str, Any]) -> None:
    for name in _ROPE_NAMES:
        if rope.get(name) is not None and rope[name] not in ROPE_TYPES:
            raise _wrong(f"{key}.{name}", rope[name], f"one of {', '.join(ROPE_TYPES)}")
    for name in _ROPE_NUMBERS:
        if rope.get(name) is not None and not _is_number(rope[name]):
            raise _wrong(f"{key}.{name}", rope[name], "a number")
    for name in _ROPE_LISTS:
        value = rope.get(name)
        if value is not None and not (isinstance(value, list) and all(map(_is_number, value))):
            raise _wrong(f"{key}.{name}", value, "a list of numbers")


def _is_number(value: object) -> bool:
    # As a comparison: NaN fails it, and an integer beyond any float does not raise.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _wrong(key: str, value: object, allowed: str) -> ParetronError:
    return ParetronError(
        Problem(
            Code.INPUT_CONFIG,
            f"{key.rpartition('.')[2]} is {str(value)[:60]!r}",
            where=f"config.json: {key}",
            fix=allowed,
        )
    )
