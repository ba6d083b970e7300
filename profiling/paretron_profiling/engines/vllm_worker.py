"""The process that runs vLLM, under vLLM's own interpreter; imports nothing of Paretron.

Started as `python -I vllm_worker.py ANSWER_FD SETTINGS_JSON`. Requests come as JSON lines on
standard input, answers go as JSON lines to the file descriptor ANSWER_FD, because vLLM prints to
standard output. When standard input closes, whoever started this is gone, and so is this process
with its group, even in the middle of a request.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import sys
import threading
import time
from typing import Any


def read_requests(requests: queue.Queue[dict[str, Any]], scratch: str) -> None:
    """Move lines from standard input to the queue; at its end, end the process group."""
    for line in sys.stdin:
        requests.put(json.loads(line))
    shutil.rmtree(scratch, ignore_errors=True)  # who made it may be gone
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)


def load(settings: dict[str, Any]) -> tuple[Any, dict[str, str]]:
    """The engine, and what it runs with."""
    import torch
    import vllm
    from vllm.platforms import current_platform

    eager = current_platform.is_cpu()
    llm = vllm.LLM(
        model=settings["model"],
        dtype=settings["dtype"],
        max_model_len=settings["context_len"],
        max_num_seqs=settings["batch"],
        kv_cache_memory_bytes=settings["kv_bytes"],
        gpu_memory_utilization=settings["memory_share"],
        quantization=settings["quantization"],
        # Measured here: each prompt computed in full, tokens in and tokens out. On a CPU there are
        # no graphs to capture, and compiling takes longer than a measurement.
        enforce_eager=eager,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        disable_log_stats=True,
        trust_remote_code=False,
        load_format="safetensors",
        seed=0,
    )
    about = {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "mode": f"{'eager' if eager else 'compiled, CUDA graphs'}, in process",
        "dtype": settings["dtype"],
        **({"weights": settings["quantization"]} if settings["quantization"] else {}),
        "device": current_platform.device_type,
        "threads": str(torch.get_num_threads()),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "not set"),
    }
    return llm.llm_engine, about


def generate(engine: Any, prompts: list[list[int]], output_len: int, tag: str) -> dict[str, Any]:
    """Send all prompts at once and step the engine until all have output_len tokens.

    Returns times since sending, taken when a step returned: of each request's first and last
    token, and the durations of the steps that returned tokens, after the first.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    names = [f"{tag}-{i}" for i in range(len(prompts))]
    first: dict[str, float] = {}
    finish: dict[str, float] = {}
    tokens: dict[str, list[int]] = {name: [] for name in names}
    steps: list[float] = []
    last = 0.0
    start = time.perf_counter()
    for name, prompt in zip(names, prompts, strict=True):
        params = SamplingParams(
            temperature=0.0,
            max_tokens=output_len,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        engine.add_request(name, {"prompt_token_ids": prompt}, params)
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter() - start
        if outputs:
            steps.append(now - last)
            last = now
        for out in outputs:
            new = out.outputs[0].token_ids
            if new:
                first.setdefault(out.request_id, now)
                tokens[out.request_id].extend(new)
            if out.finished:
                finish[out.request_id] = now
    return {
        "first_token_s": [first[n] for n in names],
        "finish_s": [finish[n] for n in names],
        "gaps_s": steps[1:],
        "tokens": [list(map(int, tokens[n])) for n in names],
    }


def main() -> None:
    """Load, say so, then answer requests until standard input closes."""
    answers = os.fdopen(int(sys.argv[1]), "w")
    os.set_inheritable(answers.fileno(), False)
    settings = json.loads(sys.argv[2])
    requests: queue.Queue[dict[str, Any]] = queue.Queue()
    reading = threading.Thread(
        target=read_requests, args=(requests, settings["scratch"]), daemon=True
    )
    reading.start()

    def answer(content: object) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    engine, about = load(settings)
    answer({"about": about})
    for count in range(sys.maxsize):
        request = requests.get()
        sample = generate(engine, request["prompts"], request["output_len"], str(count))
        answer({"sample": sample})


if __name__ == "__main__":
    main()
