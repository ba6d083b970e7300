"""What a config says about experts: which layers have them, and how many a token is routed to.

Two rules stand side by side in configs: `mlp_only_layers` lists layers without experts, and of the
others every `decoder_sparse_step`-th has them. A family that knows neither has them in every layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paretron.errors import Code, ParetronError, Problem

PER_TOKEN = "num_experts_per_tok"
RULES = _STEP, _WITHOUT = "decoder_sparse_step", "mlp_only_layers"
WIDTH_MULTIPLE = 8
_MOST = 1 << 17  # experts of all layers: above any model, and their names still fit in memory


def is_moe_layer(config: Mapping[str, Any], layer: int) -> bool:
    """Whether the layer routes its tokens to experts."""
    return layer not in (config.get(_WITHOUT) or ()) and (layer + 1) % config.get(_STEP, 1) == 0


def check_experts(config: Mapping[str, Any], *, layers: int, experts: int) -> None:
    """INPUT_CONFIG when what a config says about experts is absent or absurd."""
    if layers * experts > _MOST:
        raise _bad("num_hidden_layers", f"{layers} layers of {experts} experts", "a smaller model")
    per_token = config.get(PER_TOKEN)
    if type(per_token) is not int or not 1 <= per_token <= experts:
        allowed = f"a whole number from 1 to {experts}, the number of experts"
        raise _bad(PER_TOKEN, f"{PER_TOKEN} is {str(per_token)[:60]!r}", allowed)
    step = config.get(_STEP, 1)
    if type(step) is not int or step < 1:
        raise _bad(_STEP, f"{_STEP} is {str(step)[:60]!r}", "a whole number from 1 on")
    without = config.get(_WITHOUT)
    if without is None:
        return
    if not isinstance(without, list) or not all(
        type(layer) is int and 0 <= layer < layers for layer in without
    ):
        raise _bad(_WITHOUT, f"{_WITHOUT} is {str(without)[:60]!r}", "a list of layers' numbers")


def odd_widths(sizes: Mapping[str, int]) -> dict[str, int]:
    """The axes whose size grouped products of experts refuse: no whole 16 bytes in 16 bits."""
    if "experts" not in sizes:
        return {}
    return {axis: sizes[axis] for axis in ("hidden", "moe_ffn") if sizes[axis] % WIDTH_MULTIPLE}


def enough_experts(config: Mapping[str, Any], experts: int) -> None:
    """RECIPE_TARGET when fewer experts stay than a token is routed to."""
    if experts < config[PER_TOKEN]:
        cause = f"{experts} experts, but every token is routed to {config[PER_TOKEN]}"
        fix = f"at least {config[PER_TOKEN]}"
        raise ParetronError(Problem(Code.RECIPE_TARGET, cause, where="experts", fix=fix))


def layers_renumbered(config: Mapping[str, Any], kept: tuple[int, ...]) -> dict[str, Any]:
    """The keys that say which layers have experts, for a model of the `kept` layers.

    Layers at regular steps need not be regular among those that stay, so those without experts are
    listed. Nothing where the config has neither key.
    """
    if _STEP not in config and _WITHOUT not in config:
        return {}
    without = [new for new, old in enumerate(kept) if not is_moe_layer(config, old)]
    return {_STEP: 1, _WITHOUT: without}


def _bad(key: str, cause: str, fix: str) -> ParetronError:
    return ParetronError(Problem(Code.INPUT_CONFIG, cause, where=f"config.json: {key}", fix=fix))
