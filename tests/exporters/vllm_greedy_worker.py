"""A program for the interpreter that has vLLM: greedy tokens of several models, one by one."""

import gc
import json
import sys


def main() -> None:
    """Read {models, prompts, steps, answer}, write {model: tokens of each prompt} to `answer`."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    request = json.loads(sys.argv[1])
    params = SamplingParams(
        temperature=0.0, max_tokens=request["steps"], ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": p} for p in request["prompts"]]
    found = {}
    for model in request["models"]:
        llm = LLM(
            model=model,
            dtype="float32",
            enforce_eager=True,
            skip_tokenizer_init=True,
            max_model_len=128,
            max_num_seqs=len(prompts),
            kv_cache_memory_bytes=64 << 20,
        )
        out = llm.generate(prompts, params, use_tqdm=False)
        found[model] = [list(o.outputs[0].token_ids) for o in out]
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
    with open(request["answer"], "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
