"""Seeded random prompts of an exact length in tokens."""

from __future__ import annotations

import random
from collections.abc import Collection


def random_prompts(
    *, batch: int, input_len: int, vocab_size: int, avoid: Collection[int], seed: str
) -> list[list[int]]:
    """Uniform token ids [batch][input_len] below vocab_size, none of them in avoid.

    The same seed gives the same prompts on every machine. Special tokens are avoided because an
    engine may treat them apart (onnxruntime-genai masks the padding token out of a prompt).
    Random prompts share no prefix, so that a prefix cache cannot help.
    """
    allowed = [t for t in range(vocab_size) if t not in avoid]
    rng = random.Random(seed)
    return [rng.choices(allowed, k=input_len) for _ in range(batch)]
