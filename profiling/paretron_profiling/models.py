"""The models that are compared, and the facts about them that need no engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paretron.artifacts.jsonfile import read_object
from paretron.artifacts.reader import Checkpoint
from paretron.artifacts.values import check_values
from paretron.errors import Code
from paretron.families import explicit, family_of, kv_bytes_per_token, sizes

TEACHER = "teacher"
CONFIG = "config.json"
_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}


@dataclass(frozen=True)
class ModelFacts:
    """What memory and prompts follow from."""

    vocab_size: int
    weight_bytes: int
    kv_bytes_per_token: int
    context_len: int
    special_ids: frozenset[int] = frozenset()

    def memory_bytes(self, *, batch: int, context_len: int) -> int:
        """Weights, and the KV cache of `batch` sequences of full length; nothing else."""
        return self.weight_bytes + batch * context_len * self.kv_bytes_per_token

    @classmethod
    def of(cls, checkpoint: Path) -> ModelFacts:
        """The facts of a Hugging Face checkpoint, from its config and headers.

        Of one whose weights are quantised, which nobody may load here, its files' sizes count.
        """
        raw = read_object(checkpoint / CONFIG, code=Code.INPUT_CONFIG)
        if raw.get("quantization_config"):
            dtype = str(raw.get("dtype") or raw.get("torch_dtype"))
            return cls.of_config(
                counted_config(raw),
                weight_bytes=sum(p.stat().st_size for p in checkpoint.glob("*.safetensors")),
                kv_value_bytes=4 if dtype == "float32" else 2,
            )
        opened = Checkpoint.open(checkpoint)
        return cls.of_config(
            opened.config, weight_bytes=opened.nbytes, kv_value_bytes=_BYTES.get(opened.dtype, 2)
        )

    @classmethod
    def of_config(
        cls, config: Mapping[str, Any], *, weight_bytes: int, kv_value_bytes: int
    ) -> ModelFacts:
        """The facts of a model from its config, and the bytes that its weights take."""
        family = family_of(config)
        size = sizes(family, config)
        return cls(
            vocab_size=size["vocab"],
            weight_bytes=weight_bytes,
            kv_bytes_per_token=kv_bytes_per_token(family, config, bytes_per_value=kv_value_bytes),
            context_len=int(config.get("max_position_embeddings") or 2048),
            special_ids=_special_ids(config),
        )


@dataclass(frozen=True)
class ModelUnderTest:
    """A model by name, with a folder for each kind of export that there is ("hf", "onnx")."""

    name: str
    kind: str  # "teacher", "width", "depth", ...
    folders: Mapping[str, Path]
    facts: ModelFacts


def counted_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The config as counts need it, also of a quantised checkpoint, which nobody may load here."""
    plain = {key: value for key, value in raw.items() if key != "quantization_config"}
    config = explicit(family_of(plain), plain)
    check_values(family_of(config), config)
    return config


def _special_ids(config: Mapping[str, Any]) -> frozenset[int]:
    found: set[int] = set()
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = config.get(key)
        found.update(v for v in (value if isinstance(value, list) else [value]) if v is not None)
    return frozenset(found)
