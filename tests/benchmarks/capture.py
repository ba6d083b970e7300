"""What an offline teacher costs and saves: bytes a token, records a second, seconds a step.

python tests/benchmarks/capture.py prints JSON. Log-probabilities are those of random logits; the
step is that of a small random pair, its teacher live or captured. All in one thread, and in its
processor time, so that a busy machine does not count.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from paretron.distill.batches import Batch
from paretron.distill.capture.codec import TopTokensCodec
from paretron.distill.divergences import TopKForwardKL
from paretron.distill.objective import Computed, Objective, Prediction, Teacher
from paretron.distill.top import TopTokens
from pico import pico_model

K, POSITIONS, REPEATS = 64, 4096, 5
VOCABULARIES = (32000, 128256, 151936, 262144)


def seconds(work: Callable[[], object]) -> float:
    """The median of a few runs, after one that warms up."""
    work()
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return statistics.median(times)


def coding(vocab_size: int) -> dict[str, float]:
    """Size and speed of records."""
    codec = TopTokensCodec(vocab_size, K)
    some = TopTokens.of(3 * torch.randn(64, vocab_size), k=K, temperature=1.0)
    top = some.at(torch.arange(POSITIONS) % 64)
    records = codec.encode(top)
    encode, decode = seconds(lambda: codec.encode(top)), seconds(lambda: codec.decode(records))
    return {
        "vocab_size": vocab_size,
        "bytes_per_token": records.shape[1],
        "log_probability_error_bound": codec.error,
        "encode_tokens_per_s": POSITIONS / encode,
        "decode_tokens_per_s": POSITIONS / decode,
        "encode_mb_per_s": records.numel() / encode / 1e6,
        "decode_mb_per_s": records.numel() / decode / 1e6,
    }


def step() -> dict[str, float]:
    """Seconds of one forward and backward of a student, with its teacher's part."""
    size = {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 8000}
    teacher = Teacher(pico_model("llama", hidden_size=512, num_hidden_layers=12, **size))
    student = pico_model("llama", hidden_size=256, num_hidden_layers=6, **size)
    objective = Objective(student, divergence=TopKForwardKL(K))
    ids = torch.randint(3, 8000, (2, 256))
    batch = Batch(ids, ids, (0, 1))
    codec = TopTokensCodec(8000, K)
    said: Computed = teacher.predict(batch)
    records = codec.encode(TopTokens.of(said.logits.flat().logits(), k=K, temperature=1.0))

    def learn(prediction: Prediction) -> None:
        objective(batch, prediction, 512.0)[0].backward()
        objective.zero_grad(set_to_none=True)

    live = seconds(lambda: learn(teacher.predict(batch)))
    captured = seconds(lambda: learn(Prediction(codec.decode(records).shaped(2, 256))))
    return {"live_s": live, "captured_s": captured, "speedup": live / captured}


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = {
        "k": K,
        "torch": torch.__version__,
        "coding": [coding(size) for size in VOCABULARIES],
        "step": step(),
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
