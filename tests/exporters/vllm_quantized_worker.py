"""A program for the interpreter that has vLLM: what quantised models make of prompts, one by one.

The kernel for INT8 experts asks for a CPU with AMX. Where there is none a model with experts is
loaded all the same, and what vLLM holds of their scales is told in place of tokens.
"""

import gc
import json
import sys
from typing import Any


def main() -> None:
    """Read {models, experts, prompts, steps, answer}; write {model: what was seen} to `answer`."""
    import torch
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    request = json.loads(sys.argv[1])
    params = SamplingParams(
        temperature=0.0, max_tokens=request["steps"], ignore_eos=True, detokenize=False,
        prompt_logprobs=1,
    )  # fmt: skip
    prompts = [{"prompt_token_ids": p} for p in request["prompts"]]
    has_kernel = torch.cpu._is_amx_tile_supported()
    found: dict[str, Any] = {}
    for model in [*request["models"], *request["experts"]]:
        runs = model in request["models"] or has_kernel
        if not runs:
            torch.cpu._is_amx_tile_supported = lambda: True
        llm = LLM(
            model=model,
            dtype="bfloat16" if model in request["experts"] else "float32",
            enforce_eager=True,
            skip_tokenizer_init=True,
            max_model_len=128,
            max_num_seqs=len(prompts),
            kv_cache_memory_bytes=64 << 20,
        )
        if runs:
            out = llm.generate(prompts, params, use_tqdm=False)
            found[model] = {
                "top": [[best(d) for d in (o.prompt_logprobs or ())[1:]] for o in out],
                "greedy": [list(o.outputs[0].token_ids) for o in out],
            }
        else:
            (scales,) = llm.apply_model(scales_of_experts)
            found[model] = {"scales": scales}
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
    with open(request["answer"], "w") as file:
        json.dump(found, file)


def best(logprobs: Any) -> int:
    """The likeliest token of a position: the prompt's own is told beside it."""
    return int(max(logprobs, key=lambda token: logprobs[token].logprob))


def scales_of_experts(model: Any) -> dict[str, list[float]]:
    """Every scale that a model holds of its experts, flat."""
    return {
        name: parameter.float().flatten().tolist()
        for name, parameter in model.named_parameters()
        if "experts" in name and name.endswith("scale")
    }


if __name__ == "__main__":
    main()
