"""The shapes that the papers publish, with their parameter counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Published:
    """A published model: a teacher's config, and the student's target when it is a student.

    Counts known exactly stand as they are; those printed as 15.63e9 are compared in that precision.
    """

    name: str
    config: dict[str, Any]
    total: int | float
    non_embedding: int | float
    student: str | None = None

    def rounded(self, count: int, published: int | float) -> int | float:
        """The count in the precision of the published one."""
        return count if isinstance(published, int) else round(count / 1e9, _decimals(published))


def _decimals(number: float) -> int:
    return len(str(number).partition(".")[2])


def config(model_type: str, architecture: str, **sizes: int) -> dict[str, Any]:
    """The part of a config.json that counts depend on."""
    names = {
        "vocab": "vocab_size", "hidden": "hidden_size", "layers": "num_hidden_layers",
        "heads": "num_attention_heads", "ffn": "intermediate_size",
    }  # fmt: skip
    return {
        "model_type": model_type,
        "architectures": [architecture],
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "dtype": "bfloat16",
        **{names[axis]: size for axis, size in sizes.items()},
    }


LLAMA = config(
    "llama", "LlamaForCausalLM", vocab=128256, hidden=4096, layers=32, heads=32, ffn=14336
)
NEMO = config(
    "mistral", "MistralForCausalLM", vocab=131072, hidden=5120, layers=40, heads=32, ffn=14336
)
NEMOTRON = config(
    "nemotron", "NemotronForCausalLM", vocab=256000, hidden=6144, layers=32, heads=48, ffn=24576
)

PUBLISHED = (
    Published("Nemotron-4 15B", NEMOTRON, 15.63, 12.5),
    Published("Minitron 8B", NEMOTRON, 8.27, 6.2, "{hidden: 4096, ffn: 16384}"),
    Published("Minitron 4B", NEMOTRON, 4.19, 2.6, "{hidden: 3072, ffn: 9216, heads: 24}"),
    Published("Llama-3.1-8B", LLAMA, 8030261248, 6979588096),
    Published("4B-Width", LLAMA, 4512746496, 3724741632, "{hidden: 3072, ffn: 9216}"),
    Published("4B-Depth", LLAMA, 4540469248, 3489796096, "{layers: 16}"),
    Published("Mistral-NeMo-12B", NEMO, 12247782400, 10905605120),
    Published("MN-Minitron-8B", NEMO, 8414105600, 7340363776, "{hidden: 4096, ffn: 11520}"),
)


def recipe_text(shape: Published, *, students: str | None = None) -> str:
    """A recipe whose teacher is the folder `teacher` beside it."""
    students = students or f"{{student: {shape.student or '{layers: 16}'}}}"
    source = "{corpus: stdlib, part: %s, seq_len: 4096}"
    return (
        "schema: 1\n"
        "teacher: {model: ./teacher}\n"
        "data:\n"
        f"  calibration: {source % 'calibration'}\n"
        f"  train: {source % 'train'}\n"
        f"  validation: {source % 'validation'}\n"
        f"students: {students}\n"
        "distill: {tokens: 1.0e8, global_batch: 8}\n"
    )
