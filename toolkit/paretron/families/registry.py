"""The families there are, and finding the one that a config belongs to."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from paretron.errors import Code, ParetronError, Problem
from paretron.families.gemma import GEMMA2, GEMMA3
from paretron.families.granite import GRANITE
from paretron.families.llama import LLAMA, MISTRAL
from paretron.families.moe import MIXTRAL, QWEN3_MOE
from paretron.families.nemotron import NEMOTRON
from paretron.families.olmo2 import OLMO2
from paretron.families.phi3 import PHI3
from paretron.families.qwen import QWEN2, QWEN3
from paretron.families.starcoder2 import STARCODER2
from paretron.families.table import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        LLAMA, MISTRAL, QWEN2, QWEN3, NEMOTRON, GEMMA2, GEMMA3, PHI3, OLMO2, GRANITE, STARCODER2,
        MIXTRAL, QWEN3_MOE,
    )
}  # fmt: skip


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a Hugging Face config; INPUT_FAMILY when no table covers it."""
    model_type = config.get("model_type")
    supported = ", ".join(FAMILIES)
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        close = difflib.get_close_matches(str(model_type), FAMILIES, n=1)
        hint = f"; the closest is {close[0]}" if close else ""
        raise ParetronError(
            Problem(
                Code.INPUT_FAMILY,
                f"model_type {str(model_type)[:60]!r} is not supported",
                where="config.json: model_type",
                fix=f"supported: {supported}{hint}",
            )
        )
    family = FAMILIES[model_type]
    architectures = config.get("architectures")
    if architectures is not None and architectures != [family.architecture]:
        raise ParetronError(
            Problem(
                Code.INPUT_FAMILY,
                f"architectures is {str(architectures)[:80]}",
                where="config.json: architectures",
                fix=f"{model_type} is supported as {family.architecture}",
            )
        )
    return family
